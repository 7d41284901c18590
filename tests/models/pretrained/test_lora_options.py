import pytest

from lightning_itm.models.pretrained.lora_options import LoraOptions, lora_options


def test_one_for_both_towers():
    assert lora_options(8) == {"image": LoraOptions(8), "text": LoraOptions(8)}
    assert lora_options({"rank": 4, "alpha": 2.0}) == dict.fromkeys(("image", "text"), LoraOptions(4, 2.0))
    assert lora_options(None) == {}


def test_one_for_each():
    assert lora_options({"text": 4, "image": {"rank": 8, "target_modules": "qkv"}}) == {
        "image": LoraOptions(8, target_modules=("qkv",)),
        "text": LoraOptions(4),
    }


@pytest.mark.parametrize(
    ("lora", "error", "message"),
    [
        ("8", TypeError, "to be a rank, or a dict .* got '8'"),
        (0, ValueError, "positive integer, such as 8, got 0"),
        ({"rank": 4, "alpha": 0}, ValueError, "`alpha` of `lora` to be positive, got 0"),
        ({"rank": 4, "dropout": 1}, ValueError, r"in \[0, 1\), got 1"),
        ({"image": 4, "words": 4}, ValueError, r"got \['image', 'words'\]\. Rename or remove \['image', 'words'\]"),
        ({"r": 4, "rank": 4}, ValueError, r"remove \['r'\]"),
        ({"alpha": 4}, ValueError, "add a rank"),
    ],
)
def test_what_is_no_option(lora, error, message):
    with pytest.raises(error, match=message):
        lora_options(lora)
