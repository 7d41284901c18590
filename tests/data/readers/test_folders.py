"""A folder of images with a ``.txt`` beside each."""

from pathlib import Path

import pytest

from lightning_itm.data import read_pairs
from tests.helpers.pictures import cut_outs


def write(**texts):
    """Write a picture and a text for each name, such as ``a_jpg``."""
    for picture, (name, text) in zip(cut_outs(len(texts)), texts.items(), strict=True):
        path = Path("folder", name.replace("_", "."))
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
        path.with_suffix(".txt").write_bytes(text if isinstance(text, bytes) else text.encode())


def test_each_line_is_a_caption():
    write(a_jpg="one\n\n two\r\nthree\rwith \u2028 and \x0b\n", b_png="\ufefffour", c_PNG="five".encode("utf-16"))
    pairs = read_pairs("folder")
    assert pairs.texts == ["one", " two", "three", "with \u2028 and \x0b", "four", "five"]
    assert pairs.text_image_id.tolist() == [0, 0, 0, 0, 1, 2]


def test_every_kind_of_image():
    write(a_jpg="jpg", b_jpeg="jpeg", c_png="png", d_webp="webp", e_bmp="bmp", f_gif="gif", g_tif="tif", h_tiff="tiff")
    pairs = read_pairs("folder")
    assert pairs.texts == [image.suffix[1:] for image in pairs.images]
    assert len([pairs.evaluation()[text_id] for text_id in range(8)]) == 8


def test_files_of_macos_are_passed_over():
    write(a_jpg="one", b_jpg="two")
    for name in ("._a.jpg", "._a.txt", ".DS_Store", "._c.png"):
        Path("folder", name).write_bytes(b"\0\5\x16\7\xff")
    assert read_pairs("folder").texts == ["one", "two"]


def test_endings_in_capitals():
    write(a_JPG="one")
    Path("folder/a.txt").rename("folder/a.TXT")
    assert read_pairs("folder").texts == ["one"]


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_an_image_without_a_caption(text):
    write(a_jpg="one", b_jpg=text)
    with pytest.warns(UserWarning, match=r"1 times, first in folder.b\.txt: '.*'\. So 1 of 2 images have no caption"):
        pairs = read_pairs("folder")
    assert [image.name for image in pairs.images] == ["a.jpg"]


def test_a_text_without_an_image():
    write(a_jpg="one")
    Path("folder/readme.txt").write_text("two")
    with pytest.warns(UserWarning, match=r"1 \.txt files in folder are left out, .* The first: folder.readme\.txt"):
        assert read_pairs("folder").texts == ["one"]


def test_two_images_of_one_name():
    write(a_jpg="one", a_png="two")
    with pytest.raises(ValueError, match=r"one image and one \.txt of each name, got folder.a\.jpg and a\.png"):
        read_pairs("folder")


def test_windows_1252():
    write(a_jpg="one\na café".encode("cp1252"))
    with pytest.raises(
        ValueError, match=r"folder.a\.txt .* 0xe9 in line 2, at byte 9 of the file\. .*`encoding=\"cp1252\"`"
    ):
        read_pairs("folder")
    assert read_pairs("folder", encoding="cp1252").texts == ["one", "a café"]
