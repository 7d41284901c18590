import pytest

from lightning_itm import ShardDataset, ShardStream
from lightning_itm.data.pairs import UnreadablePairError
from tests.helpers.shards import check_pairing, img2dataset_sample, png, write_img2dataset, write_tar


def test_img2dataset(tmp_path):
    write_img2dataset(tmp_path)
    pairs = ShardDataset(tmp_path)
    assert len(pairs) == 8
    check_pairing(pairs)


def test_some_of_the_shards(tmp_path):
    write_img2dataset(tmp_path, shards=3)
    every = [str(tmp_path / f"{i:05d}.tar") for i in range(3)]
    assert ShardDataset(every[:2]).contents.first.tolist() == [0, 4, 8]
    assert len(ShardDataset(every[2])) == 4


def test_a_missing_shard_is_an_error(tmp_path):
    write_img2dataset(tmp_path, shards=3)
    pairs = ShardDataset(tmp_path, max_unreadable=1)
    (tmp_path / "00001.tar").unlink()
    assert pairs[3]["text"] == "number 3"
    with pytest.raises(FileNotFoundError, match=r"Expected shard 1 of the 3 shards at .*00001\.tar, found none"):
        pairs[4]
    with pytest.raises(FileNotFoundError, match=r"Expected shard 1 of the 3 shards"):
        list(ShardStream(pairs).read([0, 1, 2], 0, 12))


def test_a_broken_image_is_replaced_in_training_and_an_error_in_evaluation(tmp_path):
    broken = img2dataset_sample(1, image=png(1)[:50])
    write_tar(tmp_path / "00000.tar", [*img2dataset_sample(0), *broken, *img2dataset_sample(2)])
    pairs = ShardDataset(tmp_path, max_unreadable=0.5)
    with pytest.warns(UserWarning, match=r"00000\.tar, key 000000001 does not open"):
        assert pairs[1]["text"] in ("number 0", "number 2")
    assert pairs.num_replaced == 1
    with pytest.raises(RuntimeError, match=r"00000\.tar, key 000000001"):
        pairs.evaluation()[1]
    with pytest.raises(UnreadablePairError, match="key 000000001"):
        pairs.load_image(1)
