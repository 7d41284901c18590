import io
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lightning_itm import ImageTextDataset
from lightning_itm.data import UnreadableImageError, open_clip_transforms, open_rgb
from tests.helpers.pictures import cut_outs

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


class TestImages:
    def test_every_form_of_an_image_is_the_same_image(self, tmp_path):
        image = cut_outs(1)[0]
        image.save(tmp_path / "a.png")
        image.save(tmp_path / "b.png")
        forms = [image, np.asarray(image), png(image), tmp_path / "a.png", str(tmp_path / "b.png")]
        pairs = ImageTextDataset(forms, [f"cut-out {i}" for i in range(5)])
        assert all(torch.equal(pairs[i]["image"], pairs[0]["image"]) for i in range(5))
        assert pairs[0]["image"].shape == (3, 24, 24)

    @pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (5, 4, 3), (5, 4, 4)])
    def test_arrays_with_any_number_of_channels(self, shape):
        assert ImageTextDataset([np.full(shape, 255, np.uint8)], ["white"])[0]["image"].eq(1).all()

    def test_transparent_is_white(self):
        image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
        assert ImageTextDataset([image], ["nothing"])[0]["image"].eq(1).all()

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            (3.5, "got float for image 1"),
            (np.zeros((4, 4, 3)), r"got float64 \(4, 4, 3\) for image 1"),
            (np.zeros((3, 8, 8), np.uint8), r"got uint8 \(3, 8, 8\) for image 1"),
        ],
    )
    def test_what_is_no_image(self, image, message):
        with pytest.raises(TypeError, match=message):
            ImageTextDataset([cut_outs(1)[0], image], ["a", "b"])

    def test_one_path_a_caption_would_make_captions_negatives_of_each_other(self):
        with pytest.raises(ValueError, match=r"got a.png as image 0 and image 2: .*`from_csv` groups rows"):
            ImageTextDataset(["a.png", "b.png", "a.png"], ["one", "two", "three"])


def saved(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


class TestAsAViewerShowsIt:
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_a_photograph_that_was_turned(self, orientation):
        """Row 0 and column 0 of the file are these sides of the picture, by the EXIF standard."""
        sides = {1: "TL", 2: "TR", 3: "BR", 4: "BL", 5: "LT", 6: "RT", 7: "RB", 8: "LB"}[orientation]
        picture = np.zeros((8, 8, 3), np.uint8)
        picture[:3], picture[:, :3] = [200, 0, 0], [0, 200, 0]  # its top is red, its left side green
        exif = Image.Exif()
        exif[0x0112] = orientation
        # What a camera writes: row 0 of the file is the side that the standard names.
        turned = {"T": picture, "B": picture[::-1]} if sides[0] in "TB" else {}
        if turned:
            stored = turned[sides[0]] if sides[1] == "L" else turned[sides[0]][:, ::-1]
        else:
            transposed = picture.transpose(1, 0, 2)  # row 0 of the file is the left side
            stored = transposed if sides[0] == "L" else transposed[::-1]
            stored = stored if sides[1] == "T" else stored[:, ::-1]
        data = saved(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
        assert (np.asarray(open_rgb(data)) == picture).all()

    def test_sixteen_bits_become_eight(self):
        values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
        shown = np.asarray(open_rgb(saved(Image.fromarray(values), "PNG")))
        assert (shown == np.arange(256).reshape(16, 16, 1)).all()

    def test_a_dark_picture_of_sixteen_bits_stays_dark(self):
        assert np.asarray(open_rgb(saved(Image.fromarray(np.full((4, 4), 300, np.uint16)), "PNG"))).max() == 1

    @pytest.mark.parametrize(
        ("values", "expected"),
        [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 51.0, 255.0], [0, 51, 255]), ([-1.0, 0.0, 1.0], [0, 128, 255])],
    )
    def test_floats_are_scaled_by_their_range(self, values, expected):
        data = saved(Image.fromarray(np.array([values], np.float32)), "TIFF")
        assert np.asarray(open_rgb(data))[0, :, 0].tolist() == expected

    def test_floats_without_a_range(self):
        data = saved(Image.fromarray(np.array([[np.nan, 1.0]], np.float32)), "TIFF")
        with pytest.raises(UnreadableImageError, match="its values are from nan"):
            open_rgb(data)


@settings(max_examples=300, deadline=None)
@given(
    form=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]),
    cut=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
)
@pytest.mark.filterwarnings("ignore")  # of PIL, about odd metadata
def test_a_broken_file_is_unreadable_or_a_picture(form, cut, flips):
    """PIL's decoders raise many kinds of errors."""
    data = bytearray(saved(cut_outs(1)[0].convert("RGB"), form))
    for place, value in flips:
        data[int(place * len(data))] = value
    try:
        image = open_rgb(bytes(data[: int(cut * len(data))]))
    except UnreadableImageError:
        return
    assert image.mode == "RGB"


class TestOpenRGB:
    def test_a_palette_with_transparency_is_on_white_too(self):
        image = Image.new("P", (2, 2), 0)
        image.info["transparency"] = 0
        assert open_rgb(image).getpixel((0, 0)) == (255, 255, 255)

    def test_what_breaks_off_is_named(self, tmp_path):
        path = tmp_path / "half.png"
        path.write_bytes(png(cut_outs(1)[0])[:200])
        with pytest.raises(UnreadableImageError, match=r"half.png does not open"):
            open_rgb(path)


@pytest.mark.parametrize("name", ["ViT-B-32", "emoji-clip"])
def test_transforms_by_name_are_those_of_the_model(name):
    open_clip.add_model_config(EXAMPLES / "models" / "emoji-clip.json")
    _, train, evaluation = open_clip.create_model_and_transforms(name, aug_cfg={"scale": (0.5, 1.0)})
    ours = open_clip_transforms(name, augmentation={"scale": (0.5, 1.0)})
    assert str(ours["transform"]) == str(train)
    assert str(ours["eval_transform"]) == str(evaluation)


def test_transforms_by_name_know_what_weights_were_trained_with():
    plain, trained = (open_clip_transforms("PE-Core-T-16-384", tag) for tag in (None, "meta"))
    assert "mean=(0.5, 0.5, 0.5)" in str(trained["eval_transform"])
    assert "bilinear" in str(trained["eval_transform"])
    assert "mean=(0.5, 0.5, 0.5)" not in str(plain["eval_transform"])
