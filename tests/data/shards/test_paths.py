from pathlib import Path

import pytest

from lightning_itm import ImageTextDataset, write_shards
from lightning_itm.data import read_pairs
from lightning_itm.data.shards.paths import find_shards, is_remote
from tests.helpers.pictures import captions, cut_outs
from tests.helpers.shards import write_img2dataset


def test_names_of_shards(tmp_path):
    write_img2dataset(tmp_path, shards=3)
    every = [str(tmp_path / f"{i:05d}.tar") for i in range(3)]
    assert find_shards(tmp_path) == find_shards(f"{tmp_path}/{{00000..00002}}.tar") == find_shards(every) == every
    assert find_shards(every[2]) == every[2:]


def test_patterns(tmp_path):
    write_img2dataset(tmp_path, shards=3)
    assert find_shards(f"{tmp_path}/*1.tar") == [str(tmp_path / "00001.tar")]
    with pytest.raises(FileNotFoundError, match=r"found none at .*\*9\.tar"):
        find_shards(f"{tmp_path}/*9.tar")


def test_names_in_a_folder(tmp_path):
    write_img2dataset(tmp_path, shards=2)
    (tmp_path / "00001.tar").rename(tmp_path / "00001.TAR")
    (tmp_path / "._00000.tar").write_bytes(b"of macOS")
    assert [Path(shard).name for shard in find_shards(tmp_path)] == ["00000.tar", "00001.TAR"]
    assert len(read_pairs(tmp_path)) == 8


@pytest.mark.parametrize("ending", [".tar.gz", ".tgz", ".TAR.GZ", ".tar.zst"])
def test_a_compressed_shard_beside_others_is_an_error(ending, tmp_path):
    """It would be left out silently, because only the names of the others end on ``.tar``."""
    write_img2dataset(tmp_path, shards=3)
    (tmp_path / "00001.tar").rename(tmp_path / f"00001{ending}")
    for source in (tmp_path, tmp_path / f"00001{ending}"):
        with pytest.raises(
            ValueError, match=rf"an uncompressed \.tar, .* got .*00001{ending} \(1 of . are compressed\)"
        ):
            read_pairs(source)
    assert len(read_pairs(f"{tmp_path}/*.tar")) == 8
    with pytest.raises(FileExistsError, match="a folder without shards"):
        write_shards(ImageTextDataset(cut_outs(4), captions(4)), tmp_path)


def test_missing_shards_are_an_error_at_once(tmp_path):
    write_img2dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"found none at .*00002\.tar \(2 of 4 are missing\)"):
        find_shards(f"{tmp_path}/{{00000..00003}}.tar")
    with pytest.raises(FileNotFoundError, match=r"at least one \.tar"):
        find_shards(tmp_path / "..")
    write_shards(ImageTextDataset(cut_outs(4), captions(4)), "shards", images_per_shard=2)
    (tmp_path / "shards" / "00001.tar").unlink()  # the manifest knows it
    with pytest.raises(FileNotFoundError, match=r"00001\.tar"):
        find_shards("shards")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("https://host/0.tar", True), ("pipe:cat 0.tar", True), ("folder/0:1.tar", False), ("0:1.tar", False)],
)
def test_a_colon_makes_an_address_unless_it_is_in_the_name_of_a_file(name, expected, tmp_path):
    (tmp_path / "0:1.tar").touch()
    assert is_remote(name) == expected
