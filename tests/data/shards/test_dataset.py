"""Tar shards: what is written is what is read, and what is broken is named and shifts nothing."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_itm import ImageTextDataset, ShardDataset, write_shards
from lightning_itm.data import verify_shards
from lightning_itm.data.pairs import UnreadablePairError
from lightning_itm.data.shards.paths import find_shards
from tests.helpers.pictures import captions, cut_outs


def picture(number):
    """Return a picture that says its number."""
    return Image.fromarray(np.full((4, 4, 3), number, dtype=np.uint8))


def png(number):
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members, *, mode="w"):
    """Write members in the order given, as img2dataset does: one after the other, no folder."""
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def img2dataset_sample(number, caption=None, image=None):
    caption = f"number {number}" if caption is None else caption
    facts = {"caption": caption, "url": f"https://example.com/{number}", "key": f"{number:09d}", "status": "success"}
    image = png(number) if image is None else image
    return [
        (f"{number:09d}.jpg", image),
        (f"{number:09d}.json", json.dumps(facts).encode()),
        (f"{number:09d}.txt", caption.encode()),
    ]


def write_img2dataset(folder, shards=2, per_shard=4):
    for shard in range(shards):
        numbers = range(shard * per_shard, (shard + 1) * per_shard)
        write_tar(folder / f"{shard:05d}.tar", [member for number in numbers for member in img2dataset_sample(number)])


def check_pairing(pairs):
    """Every picture says the number that its text says."""
    view = pairs.evaluation()
    for text_id in range(len(pairs)):
        sample = view[text_id]
        number = round(255 * float(sample["image"][0, 0, 0]))
        assert sample["text"] == f"number {number}"
        assert sample["text_id"] == text_id
        assert sample["image_id"] == int(pairs.text_image_id[text_id])


class TestWriting:
    def test_round_trip(self, tmp_path):
        images = cut_outs(11)
        pairs = ImageTextDataset(images, captions(11))
        manifest = write_shards(pairs, tmp_path / "shards", images_per_shard=4)
        assert [(entry["images"], entry["pairs"]) for entry in manifest["shards"]] == [(4, 8), (4, 8), (3, 6)]
        assert (manifest["images"], manifest["pairs"]) == (11, 22)
        verify_shards(tmp_path / "shards")
        again = ShardDataset(tmp_path / "shards")
        assert list(again.texts) == list(pairs.texts)
        assert torch.equal(again.text_image_id, pairs.text_image_id)
        for text_id in range(22):
            assert torch.equal(again[text_id]["image"], pairs[text_id]["image"])

    def test_ids_are_kept_where_texts_are_not_in_the_order_of_images(self):
        texts, text_image_id = ["b", "a", "b again", "c"], [1, 0, 1, 2]
        pairs = ImageTextDataset([picture(i) for i in range(3)], texts, text_image_id=text_image_id)
        write_shards(pairs, "shards", images_per_shard=2)
        again = ShardDataset("shards")
        assert list(again.texts) == texts
        assert again.text_image_id.tolist() == text_image_id

    @pytest.mark.parametrize(("ending", "name"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("bmp", "BMP")])
    def test_image_files_are_copied_as_they_are(self, ending, name, tmp_path):
        path = tmp_path / f"cat.{ending}"
        cut_outs(1)[0].save(path, name)
        for source, folder in ((path, "from path"), (path.read_bytes(), "from bytes")):
            write_shards(ImageTextDataset([source], ["a cat"]), folder)
            member = ShardDataset(folder).images[0]
            if name == "BMP":
                assert Image.open(io.BytesIO(member.read_bytes())).format == "PNG"
            else:
                assert member.read_bytes() == path.read_bytes()

    def test_shards_of_shards(self):
        write_shards(ImageTextDataset(cut_outs(5), captions(5)), "one", images_per_shard=2)
        write_shards(ShardDataset("one"), "two", images_per_shard=3)
        one, two = ShardDataset("one"), ShardDataset("two")
        assert list(one.texts) == list(two.texts)
        assert all(torch.equal(one.load_image(i), two.load_image(i)) for i in range(5))

    def test_bad_input(self, tmp_path):
        pairs = ImageTextDataset(cut_outs(2), captions(2))
        with pytest.raises(ValueError, match=r"`images_per_shard` to be at least 1, got 0"):
            write_shards(pairs, "shards", images_per_shard=0)
        write_shards(pairs, "shards")
        with pytest.raises(FileExistsError, match="Nothing is overwritten"):
            write_shards(pairs, "shards")
        (tmp_path / "broken.png").write_bytes(png(3)[:40])
        with pytest.raises(ValueError, match=r"Expected manifest\.json in more"):
            verify_shards("more")

    def test_images_that_do_not_open_are_left_out_and_named(self, tmp_path):
        (tmp_path / "broken.png").write_bytes(png(3)[:40])
        images = [picture(0), tmp_path / "broken.png", picture(2), tmp_path / "missing.png", picture(4)]
        pairs = ImageTextDataset(images, [f"number {i}" for i in range(5)])
        with pytest.warns(UserWarning, match=r"2 of 5 images do not open .* image 1: .*broken\.png does not open"):
            manifest = write_shards(pairs, "shards", images_per_shard=2)
        assert [entry["images"] for entry in manifest["shards"]] == [1, 1, 1]
        kept = ShardDataset("shards")
        assert list(kept.texts) == ["number 0", "number 2", "number 4"]
        check_pairing(kept)

    def test_what_broke_off_is_no_set(self):
        class Breaks(ImageTextDataset):
            """Stop in the middle, as a full disk or a key press does."""

        pairs = Breaks([picture(i) for i in range(5)], [f"number {i}" for i in range(5)])
        pairs.texts = [*pairs.texts[:3], 3, object()]
        with pytest.raises(TypeError):
            write_shards(pairs, "shards", images_per_shard=2)
        with pytest.raises(FileNotFoundError, match=r"at least one \.tar"):
            ShardDataset("shards")
        pairs = ImageTextDataset([picture(i) for i in range(5)], [f"number {i}" for i in range(5)])
        write_shards(pairs, "shards", images_per_shard=2)
        check_pairing(ShardDataset("shards"))

    def test_verify_names_what_changed(self, tmp_path):
        write_shards(ImageTextDataset(cut_outs(4), captions(4)), "shards", images_per_shard=2)
        path = tmp_path / "shards" / "00001.tar"
        data = bytearray(path.read_bytes())
        data[700] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"another content in 00001\.tar"):
            verify_shards("shards")
        path.unlink()
        with pytest.raises(FileNotFoundError, match=r"00001\.tar"):
            verify_shards("shards")


class TestReading:
    def test_img2dataset(self, tmp_path):
        write_img2dataset(tmp_path)
        pairs = ShardDataset(tmp_path)
        assert len(pairs) == 8
        check_pairing(pairs)

    @pytest.mark.parametrize("kinds", [("jpg", "txt"), ("jpg", "json"), ("txt", "jpg"), ("json", "txt", "jpg")])
    def test_any_order_of_members(self, kinds, tmp_path):
        members = dict(img2dataset_sample(7))
        write_tar(tmp_path / "a.tar", [(f"000000007.{kind}", members[f"000000007.{kind}"]) for kind in kinds])
        check_pairing(ShardDataset(tmp_path))

    def test_patterns(self, tmp_path):
        write_img2dataset(tmp_path, shards=3)
        assert find_shards(f"{tmp_path}/*1.tar") == [str(tmp_path / "00001.tar")]
        with pytest.raises(FileNotFoundError, match=r"found none at .*\*9\.tar"):
            find_shards(f"{tmp_path}/*9.tar")

    def test_names_of_shards(self, tmp_path):
        write_img2dataset(tmp_path, shards=3)
        every = [str(tmp_path / f"{i:05d}.tar") for i in range(3)]
        assert find_shards(tmp_path) == find_shards(f"{tmp_path}/{{00000..00002}}.tar") == find_shards(every) == every
        assert ShardDataset(every[:2]).contents.first.tolist() == [0, 4, 8]
        assert len(ShardDataset(every[2])) == 4

    def test_the_index_is_built_once_and_anew_when_a_shard_changes(self, tmp_path):
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

    def test_the_index_may_lie_elsewhere(self, tmp_path):
        (tmp_path / "shards").mkdir()
        write_img2dataset(tmp_path / "shards")
        check_pairing(ShardDataset(tmp_path / "shards", index=tmp_path / "elsewhere"))
        assert {path.suffix for path in (tmp_path / "shards").iterdir()} == {".tar"}
        with pytest.raises(PermissionError, match="Name another file with `index`"):
            ShardDataset(tmp_path / "shards", index=tmp_path / "no" / "folder")

    def test_the_index_is_for_everybody_and_mends_itself(self, tmp_path):
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

    def test_texts_and_names_of_any_kind(self, tmp_path):
        samples = {
            "caf\udce9": (json.dumps({"caption": "half a pair: \ud83d"}).encode(), "half a pair: ?"),
            "folder.of/日本": (json.dumps({"texts": ["犬", "dog"], "text_ids": ["x", "y"]}).encode(), "犬"),
            "b": (json.dumps({"texts": [], "caption": "the caption"}).encode(), "the caption"),
            "c": (json.dumps(["a", "list"]).encode(), "of the text file"),
        }
        members = []
        for key, (facts, _) in samples.items():
            members += [(f"{key}.PNG", png(7)), (f"{key}.json", facts)]
            members += [(f"{key}.txt", b"\xef\xbb\xbfof the text file" if key == "c" else b"")]
        write_tar(tmp_path / "0.tar", members)
        pairs = ShardDataset(tmp_path)
        first = [int((pairs.text_image_id == image).nonzero()[0]) for image in range(4)]
        assert [pairs.texts[text] for text in first] == [text for _, text in samples.values()]
        assert pairs.contents.key[:] == list(samples)
        assert torch.equal(pairs.load_image(1), pairs.load_image(2))

    def test_missing_shards_are_an_error_at_once(self, tmp_path):
        write_img2dataset(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"found none at .*00002\.tar \(2 of 4 are missing\)"):
            ShardDataset(f"{tmp_path}/{{00000..00003}}.tar")
        with pytest.raises(FileNotFoundError, match=r"at least one \.tar"):
            ShardDataset(tmp_path / "..", index="index")
        write_shards(ImageTextDataset(cut_outs(4), captions(4)), "shards", images_per_shard=2)
        (tmp_path / "shards" / "00001.tar").unlink()  # the manifest knows it
        with pytest.raises(FileNotFoundError, match=r"00001\.tar"):
            ShardDataset("shards")


FAULTS = {
    "without a caption": (
        [*img2dataset_sample(0), ("000000001.jpg", png(1)), *img2dataset_sample(2)],
        "1 without a caption (the first: {shard}, key '000000001')",
    ),
    "an empty caption": (
        [*img2dataset_sample(0), *img2dataset_sample(1, caption=" "), *img2dataset_sample(2)],
        "1 without a caption (the first: {shard}, key '000000001')",
    ),
    "without an image": (
        [*img2dataset_sample(0), ("000000001.txt", b"number 1"), *img2dataset_sample(2)],
        "1 without an image (the first: {shard}, key '000000001')",
    ),
    "a key twice": (
        [*img2dataset_sample(0), *img2dataset_sample(2), ("000000000.jpg", png(1))],
        "1 with a key that came before (the first: {shard}, key '000000000')",
    ),
}


class TestFaults:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_bad_sample_is_left_out_and_named(self, fault, tmp_path):
        members, message = FAULTS[fault]
        write_tar(tmp_path / "00000.tar", members)
        with pytest.warns(UserWarning, match="can't be used") as caught:
            pairs = ShardDataset(tmp_path)
        assert len(caught) == 1
        assert message.format(shard=tmp_path / "00000.tar") in str(caught[0].message)
        assert list(pairs.texts) == ["number 0", "number 2"]
        check_pairing(pairs)

    @pytest.mark.parametrize("keep", [0.2, 0.35, 0.4, 0.48])
    def test_a_truncated_shard_loses_its_end_and_nothing_else(self, keep, tmp_path):
        write_img2dataset(tmp_path, shards=3)
        path = tmp_path / "00001.tar"
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
        with pytest.warns(UserWarning, match=r"after which the file breaks off \(the first: .*00001\.tar"):
            pairs = ShardDataset(tmp_path)
        counts = pairs.contents.first.diff().tolist()
        assert counts[0] == counts[2] == 4
        assert 0 < counts[1] < 4
        check_pairing(pairs)

    def test_a_shard_cut_between_two_samples_is_found_by_its_manifest(self, tmp_path):
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

    @pytest.mark.parametrize("remote", [False, True])
    @pytest.mark.parametrize("fault", ["damaged header", "two archives", "no end"])
    def test_what_tarfile_takes_for_the_end(self, fault, remote, tmp_path):
        folder = tmp_path / "shards"
        folder.mkdir()
        write_img2dataset(folder, shards=2, per_shard=12)
        path, other = folder / "00000.tar", folder / "00001.tar"
        data = path.read_bytes()
        if fault == "damaged header":
            data = data[: 9 * 1024] + b"\xff" * 512 + data[9 * 1024 + 512 :]
        elif fault == "two archives":
            data += other.read_bytes()
        else:
            data = data[: 36 * 1024]
        path.write_bytes(data)
        other.unlink()
        source, index = (f"pipe:cat {path}", "remote.index") if remote else (folder, None)
        with pytest.warns(UserWarning, match=r"1 after which the file breaks off \(the first: .*00000\.tar, key '0000"):
            pairs = ShardDataset(source, index=index)
        assert len(pairs) == (3 if fault == "damaged header" else 12)

    def test_a_compressed_shard_is_named(self, tmp_path):
        write_tar(tmp_path / "00000.tar", img2dataset_sample(0))
        write_tar(tmp_path / "00001.tar", img2dataset_sample(1), mode="w:gz")
        with pytest.warns(UserWarning, match=r"no uncompressed tar .*00001\.tar"):
            assert len(ShardDataset(tmp_path)) == 1

    def test_nothing_to_use(self, tmp_path):
        write_tar(tmp_path / "00000.tar", [("a.jpg", png(1))])
        with pytest.raises(ValueError, match=r"found none \(\{'without a caption': 1\}\)\. A sample is"):
            ShardDataset(tmp_path)

    def test_a_broken_image_is_replaced_in_training_and_an_error_in_evaluation(self, tmp_path):
        broken = img2dataset_sample(1, image=png(1)[:50])
        write_tar(tmp_path / "00000.tar", [*img2dataset_sample(0), *broken, *img2dataset_sample(2)])
        pairs = ShardDataset(tmp_path)
        with pytest.warns(UserWarning, match=r"00000\.tar, key 000000001 does not open"):
            assert pairs[1]["text"] == "number 2"
        assert int(pairs.num_replaced) == 1
        with pytest.raises(RuntimeError, match=r"00000\.tar, key 000000001"):
            pairs.evaluation()[1]
        with pytest.raises(UnreadablePairError, match="key 000000001"):
            pairs.load_image(1)
