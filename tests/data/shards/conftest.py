import pytest

from lightning_itm import ShardDataset, write_shards
from tests.helpers.shards import TRANSFORMS
from tests.helpers.tiny import tiny_pairs


@pytest.fixture
def shards(tmp_path):
    """The pictures of the tiny set with two texts each, in five shards."""
    write_shards(tiny_pairs(), tmp_path / "shards", images_per_shard=5)
    return ShardDataset(tmp_path / "shards", **TRANSFORMS)
