import pytest

from lightning_itm import ImageTextDataset
from tests.helpers.pictures import cut_outs


def test_lists_and_flat_ids_are_the_same():
    images = cut_outs(3)
    nested = ImageTextDataset(images, [["a"], ["b", "c"], ["d"]])
    flat = ImageTextDataset(images, ["a", "b", "c", "d"], text_image_id=[0, 1, 1, 2])
    for pairs in (nested, flat):
        assert [(pairs[i]["text"], pairs[i]["image_id"], pairs[i]["text_id"]) for i in range(len(pairs))] == [
            ("a", 0, 0),
            ("b", 1, 1),
            ("c", 1, 2),
            ("d", 2, 3),
        ]


@pytest.mark.parametrize(
    ("images", "texts", "ids", "message"),
    [
        (0, [], None, "at least one image, got none"),
        (2, ["a"], None, "each of the 2 images, got 1"),
        (3, [["a"], [], []], None, r"an empty list for image 1 \(2 of 3\)"),
        (2, ["a", "b"], [0], "each of the 2 texts, got 1"),
        (2, ["a", "b"], [0, 2], "every number from 0 to 1, .* Got 2 numbers from 0 to 2"),
        (3, ["a", "b"], [0, 2], "dense: every number from 0 to 2"),
        (2, ["a", "b"], [1, 2], "Got 2 numbers from 1 to 2"),
    ],
)
def test_that_do_not_fit(images, texts, ids, message):
    with pytest.raises(ValueError, match=message):
        ImageTextDataset(cut_outs(images) if images else [], texts, text_image_id=ids)


@pytest.mark.parametrize("text", [None, float("nan"), 3, {"en": "a"}])
def test_that_are_no_strings(text):
    for texts in (["a", text], [["a"], [text]]):
        with pytest.raises(TypeError, match=f"every text to be a string, got {text} for text 1"):
            ImageTextDataset(cut_outs(2), texts)


@pytest.mark.parametrize("texts", ["ab", {"a": "x", "b": "y"}, {"a", "b"}])
def test_that_are_no_list(texts):
    """Iterated over, each would give two texts: its letters, its keys, or its entries in any order."""
    with pytest.raises(TypeError, match=f"`texts` to be a list with one entry per image, got {type(texts).__name__}"):
        ImageTextDataset(cut_outs(2), texts)
