import pytest
import torch

from lightning_itm.mining import NegativeTable
from lightning_itm.mining.state import check_state, fingerprint
from tests.helpers.tiny import NUM_IMAGES, tiny_pairs

TABLE = {"texts_per_image": 12, "images_per_text": 8}


def state_of(pairs):
    texts, images = torch.zeros(NUM_IMAGES, 12), torch.zeros(2 * NUM_IMAGES, 8)
    return {"fingerprint": fingerprint(pairs), "texts": texts, "images": images}


def test_fits():
    check_state(state_of(tiny_pairs()), tiny_pairs(), NegativeTable(NUM_IMAGES, 2 * NUM_IMAGES, **TABLE))


@pytest.mark.parametrize("change", ["a text", "an image of a text", "order"])
def test_another_set(change):
    pairs, other = tiny_pairs(), tiny_pairs()
    other.texts, other.text_image_id = list(other.texts), other.text_image_id.clone()
    if change == "a text":
        other.texts[0] += "!"
    elif change == "an image of a text":
        other.text_image_id[0] = 1
    else:
        other.texts.reverse()
    with pytest.raises(ValueError, match="negatives to be of this training set, got those of another"):
        check_state(state_of(pairs), other, NegativeTable(NUM_IMAGES, 2 * NUM_IMAGES, **TABLE))


def test_another_size():
    table = NegativeTable(NUM_IMAGES, 2 * NUM_IMAGES, **{**TABLE, "texts_per_image": 9})
    with pytest.raises(ValueError, match=r"Expected 9 texts per image and 8 images per text, got \(12, 8\)"):
        check_state(state_of(tiny_pairs()), tiny_pairs(), table)
