import lightning as L
import pytest
import torch
from torch import nn

from lightning_itm.mining import NegativeTable
from lightning_itm.mining.mine import FAST_DEV_RUN_PAIRS, mine_into
from tests.helpers.tiny import NUM_IMAGES, SILENT, Tiny, tiny_data, tiny_pairs

OPTIONS = {"batch_size": 8, "num_workers": 0}


def empty_table(num_images=NUM_IMAGES, texts_per_image=6, images_per_text=4):
    counts = {"texts_per_image": texts_per_image, "images_per_text": images_per_text}
    return NegativeTable(num_images, 2 * num_images, **counts)


def test_publishes_the_hardest():
    table, pairs, model = empty_table(), tiny_pairs(), Tiny()
    table.is_pending = True
    encoded, logs = mine_into(table, pairs, L.Trainer(**SILENT), model, **OPTIONS)
    assert not table.is_pending
    scores = encoded.image_embeddings @ encoded.text_embeddings.T
    scores[torch.arange(NUM_IMAGES)[:, None] == pairs.text_image_id] = -2
    torch.testing.assert_close(scores.gather(1, table.texts.long()), scores.topk(6).values)
    assert logs["mining/changed_share"] == 1
    assert logs["mining/rejected_share"] == 0
    _, again = mine_into(table, pairs, L.Trainer(**SILENT), model, **OPTIONS)
    assert again["mining/changed_share"] == 0, "the same model mines the same"


def test_embeddings_that_are_not_finite_keep_the_table():
    table, model = empty_table(), Tiny()
    table.texts.fill_(7)
    nn.init.constant_(model.image_encoder[1].weight, torch.nan)
    with pytest.raises(ValueError, match="Expected finite image embeddings"):
        mine_into(table, tiny_pairs(), L.Trainer(**SILENT), model, **OPTIONS)
    assert (table.texts == 7).all()


def test_a_fast_dev_run_mines_the_first_pairs():
    num_images = FAST_DEV_RUN_PAIRS // 2 + 10
    table, pairs = empty_table(num_images), tiny_pairs(num_images)
    mine_into(table, pairs, L.Trainer(**SILENT, fast_dev_run=True), Tiny(), batch_size=64, num_workers=0)
    assert (table.texts[: FAST_DEV_RUN_PAIRS // 2] >= 0).all()
    assert (table.texts[FAST_DEV_RUN_PAIRS // 2 :] == -1).all()
    assert (table.images[FAST_DEV_RUN_PAIRS:] == -1).all()


def test_workers_are_as_many_as_the_datamodule_has():
    """And not twice as many, as where a progress bar makes an iterator of its own."""
    trainer, seen, before = L.Trainer(**SILENT), [], set(torch.multiprocessing.active_children())
    trainer.datamodule = tiny_data(num_workers=1)

    class Watched(Tiny):
        def encode_image(self, image):
            seen.append(set(torch.multiprocessing.active_children()))
            return super().encode_image(image)

    mine_into(empty_table(), tiny_pairs(), trainer, Watched(), batch_size=8, num_workers=None)
    assert len(seen[0] - before) == 1
