"""Transfers that break off. A pipe fails as a connection does: a part of the shard comes, and then an error."""

import pytest
import torch

from lightning_itm import ShardDataset, ShardStream
from lightning_itm.data.shards import paths
from tests.helpers.shards import streamed, write_img2dataset


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "WAITS", (0.0, 0.0, 0.0))
    write_img2dataset(tmp_path, shards=3, per_shard=6)
    return tmp_path


def breaking_off(path, size, times):
    """Return the address of a shard of which ``size`` bytes come, for so many times, and then all of it."""
    tries = path.with_suffix(".tries")
    is_broken = f"[ $(wc -l < {tries}) -le {times} ]"
    return f"pipe:echo >> {tries}; if {is_broken}; then head -c {size} {path}; exit 18; else cat {path}; fi"


def addresses(folder, **broken):
    whole = [f"pipe:cat {folder}/{shard:05d}.tar" for shard in range(3)]
    return [whole[0], breaking_off(folder / "00001.tar", **broken), whole[2]]


@pytest.mark.parametrize("size", [0, 700, 2000, 5000, 9000])
@pytest.mark.parametrize("times", [1, 3])
def test_a_shard_is_fetched_again(folder, size, times):
    """Whether the transfer breaks off within an image, a text, a header or between them."""
    local = ShardDataset(folder)
    remote = ShardDataset(addresses(folder, size=size, times=times), index=folder / "i")
    assert list(remote.texts) == list(local.texts)
    (folder / "00001.tries").unlink()
    whole, again = (streamed(ShardStream(pairs, shuffle_buffer=4), num_workers=0) for pairs in (local, remote))
    assert len((folder / "00001.tries").read_text()) == times + 1
    assert [batch["text"] for batch in again] == [batch["text"] for batch in whole]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(again, whole, strict=True))
    assert remote.num_replaced == 0


def test_the_end_of_patience_names_the_shard(folder):
    broken = addresses(folder, size=3000, times=99)
    with pytest.raises(OSError, match=r"fetch the shard pipe:.*00001\.tar.* in each of 4 tries\. .* can be resumed"):
        ShardDataset(broken, index=folder / "i")
    (folder / "00001.tries").unlink()
    pairs = ShardDataset(addresses(folder, size=3000, times=0), index=folder / "i")
    pairs.contents.shards[1] = broken[1]
    with pytest.raises(OSError, match=r"fetch the shard pipe:.*00001\.tar.* in each of 4 tries\. .* can be resumed"):
        streamed(ShardStream(pairs), num_workers=0)
