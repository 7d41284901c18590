"""What is written is what is read, and nothing is overwritten or left half done."""

import io

import pytest
import torch
from PIL import Image

from lightning_itm import ImageTextDataset, ShardDataset, write_shards
from lightning_itm.data import verify_shards
from tests.helpers.pictures import captions, cut_outs
from tests.helpers.shards import check_pairing, picture, png


def test_round_trip(tmp_path):
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


def test_ids_are_kept_where_texts_are_not_in_the_order_of_images():
    texts, text_image_id = ["b", "a", "b again", "c"], [1, 0, 1, 2]
    pairs = ImageTextDataset([picture(i) for i in range(3)], texts, text_image_id=text_image_id)
    write_shards(pairs, "shards", images_per_shard=2)
    again = ShardDataset("shards")
    assert list(again.texts) == texts
    assert again.text_image_id.tolist() == text_image_id


@pytest.mark.parametrize(("ending", "name"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("bmp", "BMP")])
def test_image_files_are_copied_as_they_are(ending, name, tmp_path):
    path = tmp_path / f"cat.{ending}"
    cut_outs(1)[0].save(path, name)
    for source, folder in ((path, "from path"), (path.read_bytes(), "from bytes")):
        write_shards(ImageTextDataset([source], ["a cat"]), folder)
        member = ShardDataset(folder).images[0]
        if name == "BMP":
            assert Image.open(io.BytesIO(member.read_bytes())).format == "PNG"
        else:
            assert member.read_bytes() == path.read_bytes()


def test_shards_of_shards():
    write_shards(ImageTextDataset(cut_outs(5), captions(5)), "one", images_per_shard=2)
    write_shards(ShardDataset("one"), "two", images_per_shard=3)
    one, two = ShardDataset("one"), ShardDataset("two")
    assert list(one.texts) == list(two.texts)
    assert all(torch.equal(one.load_image(i), two.load_image(i)) for i in range(5))


def test_bad_input(tmp_path):
    pairs = ImageTextDataset(cut_outs(2), captions(2))
    with pytest.raises(ValueError, match=r"`images_per_shard` to be at least 1, got 0"):
        write_shards(pairs, "shards", images_per_shard=0)
    write_shards(pairs, "shards")
    with pytest.raises(FileExistsError, match="Nothing is overwritten"):
        write_shards(pairs, "shards")
    (tmp_path / "broken.png").write_bytes(png(3)[:40])
    with pytest.raises(ValueError, match=r"Expected manifest\.json in more"):
        verify_shards("more")


def test_images_that_do_not_open_are_left_out_and_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(png(3)[:40])
    images = [picture(0), tmp_path / "broken.png", picture(2), tmp_path / "missing.png", picture(4)]
    with pytest.warns(UserWarning, match=r"1 of 5 images are missing, the first: .*missing\.png"):
        pairs = ImageTextDataset(images, [f"number {i}" for i in range(5)], max_unreadable=0.2)
    with pytest.warns(UserWarning, match=r"2 of 5 images do not open .* image 1: .*broken\.png does not open"):
        manifest = write_shards(pairs, "shards", images_per_shard=2)
    assert [entry["images"] for entry in manifest["shards"]] == [1, 1, 1]
    kept = ShardDataset("shards")
    assert list(kept.texts) == ["number 0", "number 2", "number 4"]
    check_pairing(kept)


def test_what_broke_off_is_no_set():
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


def test_verify_names_what_changed(tmp_path):
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
