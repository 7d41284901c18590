import os
import subprocess
import sys
import tarfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_itm import ImageTextDataset, ShardDataset, write_shards
from lightning_itm.data.inputs.packed_strings import PackedStrings
from tests.helpers.no_room import SMALL_DISK, files_below, on_a_small_disk
from tests.helpers.shards import check_pairing, img2dataset_sample, picture, png, write_img2dataset, write_tar


@given(st.lists(st.text(max_size=9), max_size=9))
def test_packed_strings_are_a_sequence_of_these_strings(strings):
    packed = PackedStrings.pack(strings)
    assert list(packed) == strings
    assert packed[1:-1] == strings[1:-1]
    assert [packed[index] for index in range(-len(strings), 0)] == strings
    with pytest.raises(IndexError, match=f"an index below {len(strings)}, got {len(strings)}"):
        packed[len(strings)]


def test_the_index_is_built_once_and_anew_when_a_shard_changes(tmp_path):
    write_img2dataset(tmp_path)
    assert len(ShardDataset(tmp_path)) == 8
    (index,) = tmp_path.glob("*.index")
    built = index.stat().st_mtime_ns
    assert len(ShardDataset(tmp_path)) == 8
    assert index.stat().st_mtime_ns == built
    write_tar(tmp_path / "00001.tar", img2dataset_sample(99))
    pairs = ShardDataset(tmp_path)
    assert len(pairs) == 5
    check_pairing(pairs)


def test_the_index_may_lie_elsewhere(tmp_path):
    (tmp_path / "shards").mkdir()
    write_img2dataset(tmp_path / "shards")
    check_pairing(ShardDataset(tmp_path / "shards", index=tmp_path / "elsewhere"))
    assert {path.suffix for path in (tmp_path / "shards").iterdir()} == {".tar"}
    with pytest.raises(PermissionError, match="Name another file with `index`"):
        ShardDataset(tmp_path / "shards", index=tmp_path / "no" / "folder")


def test_the_index_is_for_everybody_and_mends_itself(tmp_path):
    write_img2dataset(tmp_path)
    old = os.umask(0o022)
    try:
        ShardDataset(tmp_path)
    finally:
        os.umask(old)
    (index,) = tmp_path.glob("*.index")
    assert index.stat().st_mode & 0o777 == 0o644
    for damaged in (b"", b"no index", index.read_bytes()[:500]):
        index.write_bytes(damaged)
        check_pairing(ShardDataset(tmp_path))
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".tar"] == [index.name]


def test_one_damaged_byte_is_enough(tmp_path):
    """Whichever: a text, an offset, or what holds the file together."""
    write_img2dataset(tmp_path, shards=1)
    ShardDataset(tmp_path)
    (index,) = tmp_path.glob("*.index")
    whole = index.read_bytes()
    for place in range(0, len(whole), 29):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        index.write_bytes(damaged)
        check_pairing(ShardDataset(tmp_path))


class TestNoRoomForTheIndex:
    def test_a_limit_of_the_size_of_files(self, tmp_path):
        write_img2dataset(tmp_path, shards=1)
        with pytest.raises(PermissionError, match="Name another file with `index`, or make room"), files_below(1000):
            ShardDataset(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["00000.tar"]

    @SMALL_DISK
    @pytest.mark.slow
    def test_a_full_disk(self, tmp_path):
        write_img2dataset(tmp_path, shards=1)
        shard, disk = tmp_path / "00000.tar", tmp_path / "disk"
        disk.mkdir()
        code = (
            "import os, shutil, sys; from lightning_itm import ShardDataset; shutil.copy(*sys.argv[1:])\n"
            "try: ShardDataset(sys.argv[2])\n"
            "except PermissionError as error: print(error, os.listdir(sys.argv[2]))"
        )
        command = on_a_small_disk(disk, shard.stat().st_size, [sys.executable, "-c", code, str(shard), str(disk)])
        ended = subprocess.run(command, check=False, capture_output=True, text=True)
        assert "Name another file with `index`, or make room. ['00000.tar']" in ended.stdout, ended.stderr


def test_no_index_for_remote_shards():
    with pytest.raises(ValueError, match="Expected `index`, the file in which to keep"):
        ShardDataset("https://example.com/{0..3}.tar")


def test_a_shard_cut_between_two_samples_is_found_by_its_manifest(tmp_path):
    pairs = ImageTextDataset([picture(i) for i in range(4)], [f"number {i}" for i in range(4)])
    write_shards(pairs, "shards", images_per_shard=2)
    path = tmp_path / "shards" / "00000.tar"
    with tarfile.open(path) as archive:
        end = archive.getmembers()[1].offset_data + 512
    path.write_bytes(path.read_bytes()[:end])
    with pytest.warns(UserWarning, match=r"another size than manifest\.json says \(the first: shards/00000\.tar\)"):
        kept = ShardDataset("shards")
    assert len(kept) == 3
    check_pairing(kept)


def test_nothing_to_use(tmp_path):
    write_tar(tmp_path / "00000.tar", [("a.jpg", png(1))])
    with pytest.raises(ValueError, match=r"found none \(\{'without a caption': 1\}\)\. A sample is"):
        ShardDataset(tmp_path)


def test_an_index_of_an_earlier_version_is_built_anew(tmp_path):
    """Version 1 had a .txt of two lines as one text, and shards that are as they were."""
    write_tar(tmp_path / "0.tar", [("0.png", png(0)), ("0.txt", b"one\ntwo")])
    ShardDataset(tmp_path)
    (index,) = tmp_path.glob("*.index")
    values = torch.load(index, weights_only=True)
    old = PackedStrings.pack(["one\ntwo"])
    torch.save({**values, "version": 1, "text": [old.data, old.end], "text_image_id": torch.tensor([0])}, index)
    assert ShardDataset(tmp_path).texts[:] == ["one", "two"]
    assert torch.load(index, weights_only=True)["version"] == 2
