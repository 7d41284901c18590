import pytest
import torch
from torch.utils.data import DataLoader

from lightning_itm import HardNegativeDataset
from lightning_itm.data import collate_pairs
from lightning_itm.mining import NegativeTable, draw_from_rows
from lightning_itm.mining.negative_table import check_state, draw_from_row, fingerprint
from tests.helpers.tiny import NUM_IMAGES, tiny_pairs

NUM_TEXTS = 2 * NUM_IMAGES
COUNTS = {"texts_per_image": 12, "images_per_text": 8}


def small_table():
    return NegativeTable(3, 4, texts_per_image=2, images_per_text=1)


def dataset_that_waits():
    table = NegativeTable(NUM_IMAGES, NUM_TEXTS, texts_per_image=10, images_per_text=2)
    table.is_pending = True
    return HardNegativeDataset(tiny_pairs(), table)


class TestTable:
    def test_clear_removes_all_entries(self):
        table = small_table()
        table.publish(torch.ones(3, 2), torch.ones(4, 1))
        table.clear()
        assert (table.texts == -1).all()
        assert (table.images == -1).all()

    def test_waits_in_no_main_process(self):
        with pytest.raises(RuntimeError, match="nothing was mined before the first batch"):
            dataset_that_waits()[0]

    def test_a_worker_waits_until_it_is_published(self):
        pairs = dataset_that_waits()
        iterator = iter(DataLoader(pairs, 4, num_workers=1, collate_fn=collate_pairs))
        pairs.table.publish(torch.full((NUM_IMAGES, 10), 7), torch.full((NUM_TEXTS, 2), 5))
        assert set(next(iterator)["hard"]["image_id"].tolist()) == {5}


def slow_draw(texts, images, first, second, coupled_ranks):
    """Draw for one pair, as the paper describes it, and −1 where there is nothing."""
    mined_texts, mined_images = [i for i in texts if i >= 0], [i for i in images if i >= 0]
    rank = int(first * len(mined_texts))
    if coupled_ranks and mined_texts:
        image_rank = min(rank * len(images) // len(texts), len(mined_images) - 1)
    else:
        image_rank = int(second * len(mined_images))
    return mined_texts[rank] if mined_texts else -1, mined_images[image_rank] if mined_images else -1


class TestDrawFromRows:
    @pytest.mark.parametrize("coupled_ranks", [True, False])
    @pytest.mark.parametrize(("texts_per_image", "images_per_text"), [(10, 2), (3, 7), (1, 1)])
    def test_equals_a_slow_loop(self, coupled_ranks, texts_per_image, images_per_text):
        """Also where rows are not full, or empty."""
        num_rows = 200
        rows = []
        for width in (texts_per_image, images_per_text):
            row = torch.randint(0, 99, (num_rows, width))
            rows.append(row.where(torch.arange(width) < torch.randint(0, width + 1, (num_rows, 1)), -1))
        numbers = torch.rand(2, num_rows, dtype=torch.float64)
        text_id, image_id = draw_from_rows(*rows, *numbers, coupled_ranks=coupled_ranks)
        lists = (part.tolist() for part in (*rows, *numbers))
        expected = [slow_draw(*values, coupled_ranks) for values in zip(*lists, strict=True)]
        assert list(zip(text_id.tolist(), image_id.tolist(), strict=True)) == expected
        one_by_one = zip(*rows, *numbers.tolist(), strict=True)
        assert [draw_from_row(*values, coupled_ranks=coupled_ranks) for values in one_by_one] == expected
        assert (text_id < 0).any()

    def test_published_ranks(self):
        """With 300 texts and 60 images, the text of rank n comes with the image of rank n // 5."""
        texts, images = torch.arange(300).expand(300, -1), torch.arange(60).expand(300, -1)
        first = (torch.arange(300, dtype=torch.float64) + 0.5) / 300
        text_id, image_id = draw_from_rows(texts, images, first, first, coupled_ranks=True)
        assert torch.equal(text_id, torch.arange(300))
        assert torch.equal(image_id, torch.arange(300) // 5)


def state_of(pairs):
    texts, images = torch.zeros(NUM_IMAGES, 12), torch.zeros(2 * NUM_IMAGES, 8)
    return {"fingerprint": fingerprint(pairs), "texts": texts, "images": images}


def test_a_state_of_this_set_fits():
    check_state(state_of(tiny_pairs()), tiny_pairs(), NegativeTable(NUM_IMAGES, 2 * NUM_IMAGES, **COUNTS))


@pytest.mark.parametrize("change", ["a text", "an image of a text", "order"])
def test_a_state_of_another_set(change):
    pairs, other = tiny_pairs(), tiny_pairs()
    other.texts, other.text_image_id = list(other.texts), other.text_image_id.clone()
    if change == "a text":
        other.texts[0] += "!"
    elif change == "an image of a text":
        other.text_image_id[0] = 1
    else:
        other.texts.reverse()
    with pytest.raises(ValueError, match="negatives to be of this training set, got those of another"):
        check_state(state_of(pairs), other, NegativeTable(NUM_IMAGES, 2 * NUM_IMAGES, **COUNTS))


def test_a_state_of_another_size():
    table = NegativeTable(NUM_IMAGES, 2 * NUM_IMAGES, **{**COUNTS, "texts_per_image": 9})
    with pytest.raises(ValueError, match=r"Expected 9 texts per image and 8 images per text, got \(12, 8\)"):
        check_state(state_of(tiny_pairs()), tiny_pairs(), table)
