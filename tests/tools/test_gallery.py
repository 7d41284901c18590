"""The pictures of the gallery, as they were committed."""

import re
from pathlib import Path

import pytest
from PIL import Image

DOCS = Path(__file__).parents[2] / "docs"
PICTURES = sorted((DOCS / "assets" / "gallery").glob("*.png"))
SHOWN = re.findall(r"!\[(.*)\]\((assets/gallery/.*)\)", (DOCS / "gallery.md").read_text(encoding="utf-8"))


def test_the_page_shows_every_picture_with_words_for_those_who_do_not_see_it():
    assert {DOCS / path for _, path in SHOWN} | {PICTURES[0].parent / "readme.png"} == set(PICTURES)
    assert len(PICTURES) == 6
    assert all(len(words) > 60 for words, _ in SHOWN)


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_a_picture_is_small_and_shows_something(path):
    assert path.stat().st_size < 200 * 1024
    with Image.open(path) as image:
        assert min(image.size) >= 300
        colors = image.convert("RGB").getcolors(maxcolors=256)
    assert colors is not None, "at most 256 colours"
    most, color = max(colors)
    assert color == (255, 255, 255)
    assert 0.3 < most / (image.width * image.height) < 0.98
