import pytest
import torch

from lightning_itm import ImageTextDataset
from lightning_itm.mining import NegativeTable, contact_sheet
from tests.helpers.pictures import captions, cut_outs

NUM_IMAGES, SHOWN, NUM_NEGATIVES = 6, 4, 3
COLUMNS = 2 + NUM_NEGATIVES  # the image, the texts, and mined images


def mined(images=None):
    texts = [[rf"${text} \foo$" for text in of_image] for of_image in captions(NUM_IMAGES)]
    pairs = ImageTextDataset(images or cut_outs(NUM_IMAGES), texts)
    table = NegativeTable(NUM_IMAGES, len(pairs), texts_per_image=3, images_per_text=3)
    owner = pairs.text_image_id
    places = torch.arange(3)
    table.publish(
        (2 * torch.arange(NUM_IMAGES)[:, None] + 2 + places) % len(pairs), (owner[:, None] + 1 + places) % NUM_IMAGES
    )
    return pairs, table


def test_draws_images_and_texts():
    """Also a text that matplotlib would read as mathematics."""
    figure = contact_sheet(*mined(), SHOWN, num_negatives=NUM_NEGATIVES)
    figure.canvas.draw()
    assert len(figure.axes) == SHOWN * COLUMNS
    for number, ax in enumerate(figure.axes):
        if number % COLUMNS == 1:
            assert [text.get_text().startswith("$") for text in ax.texts] == [True, True]
        else:
            assert len(ax.images) == 1


def test_an_image_that_does_not_open():
    figure = contact_sheet(*mined([b"no image"] * NUM_IMAGES), 1, num_negatives=NUM_NEGATIVES)
    assert figure.axes[0].texts[0].get_text() == "unreadable"


def test_pairs_without_mined_negatives_are_not_shown():
    pairs, table = mined()
    table.texts[1:], table.images[2:] = -1, -1
    figure = contact_sheet(pairs, table, 99, num_negatives=NUM_NEGATIVES)
    assert len(figure.axes) == 2 * COLUMNS, "both texts of image 0"


def test_nothing_mined():
    pairs, table = mined()
    table.clear()
    with pytest.raises(ValueError, match="Expected mined negatives to draw, found none"):
        contact_sheet(pairs, table)


def test_the_end_of_a_long_text_is_shown_where_it_fits():
    """Captions of neighbours often differ at the end only."""
    pairs, table = mined()
    pairs.texts[:] = [f"{'a walk in the park with ' * 2}dog {number}" for number in range(len(pairs))]
    figure = contact_sheet(pairs, table, 1, num_negatives=NUM_NEGATIVES)
    hardest = figure.axes[1].texts[1]
    shown = hardest.get_text().split("\n")
    assert all("dog" in line for line in shown)
    assert len(set(shown)) == NUM_NEGATIVES
    figure.draw_without_rendering()  # the layout is made now
    assert max(text.get_window_extent().x1 for text in figure.axes[1].texts) < figure.axes[2].get_window_extent().x0, (
        "no text lies on a picture"
    )
