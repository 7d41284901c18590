import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.nn.functional import normalize

from lightning_itm import OfflineHardNegativeMining
from lightning_itm.mining.training_embeddings import TrainingEmbeddings, step_embeddings
from tests.helpers.tiny import SILENT, Tiny, tiny_data

OWNER = torch.tensor([0, 0, 1, 2, 2])
HALF = 2e-3  # float16 has 11 bits


def vectors(num_rows, dim=6):
    return normalize(torch.randn(num_rows, dim))


def filled():
    kept = TrainingEmbeddings(OWNER, 3)
    images, texts = vectors(5), vectors(5)
    kept.update(images, texts, torch.arange(5))
    return kept, images, texts


def test_an_image_is_the_mean_of_its_pairs():
    kept, images, texts = filled()
    encoded = kept.encoded()
    expected = torch.stack([images[:2].mean(0), images[2], images[3:].mean(0)])
    torch.testing.assert_close(encoded.image_embeddings, normalize(expected), atol=HALF, rtol=0)
    torch.testing.assert_close(encoded.text_embeddings, texts, atol=HALF, rtol=0)
    assert encoded.image_embeddings.dtype == torch.float32
    assert encoded.image_is_valid.all()
    assert encoded.text_is_valid.all()


def test_captions_are_mined_with_the_embeddings():
    kept, captions = TrainingEmbeddings(OWNER, 3, torch.tensor([0, 1, 0, 2, 3])), torch.tensor([0, 1, 0, 2, 3])
    kept.update(vectors(5), vectors(5), torch.arange(5))
    assert torch.equal(kept.encoded().caption_id, captions)
    of_image, of_text = kept.encoded().captions()
    assert of_image.tolist() == [[0], [0], [-1]]
    assert of_text.tolist() == captions[:, None].tolist()


def test_a_pair_that_is_left_out_keeps_its_older_row():
    kept, _, texts = filled()
    new = vectors(2)
    kept.update(vectors(2), new, torch.tensor([4, 1]))
    found = kept.encoded().text_embeddings
    torch.testing.assert_close(found[[4, 1]], new, atol=HALF, rtol=0)
    torch.testing.assert_close(found[[0, 2, 3]], texts[[0, 2, 3]], atol=HALF, rtol=0)


def test_a_pair_that_was_never_seen_counts_for_nothing():
    kept, images = TrainingEmbeddings(OWNER, 3), vectors(2)
    kept.update(images, vectors(2), torch.tensor([0, 3]))
    encoded = kept.encoded()
    torch.testing.assert_close(encoded.image_embeddings[[0, 2]], images, atol=HALF, rtol=0)
    assert encoded.text_is_valid.tolist() == [True, False, False, True, False]
    assert encoded.image_is_valid.tolist() == [True, False, True]


def test_state_goes_on():
    kept, *_ = filled()
    state = kept.state_dict()
    resumed = TrainingEmbeddings(OWNER, 3)
    resumed.load_state_dict(state)
    before = kept.encoded().text_embeddings
    kept.update(vectors(1), vectors(1), torch.tensor([2]))
    assert torch.equal(resumed.encoded().text_embeddings, before), "the state is a copy"


def test_embeddings_that_are_not_finite():
    kept, *_ = filled()
    kept.update(vectors(1) * torch.nan, vectors(1), torch.tensor([2]))
    with pytest.raises(ValueError, match="finite image embeddings in training, got NaN"):
        kept.encoded()


def test_before_the_first_step():
    with pytest.raises(RuntimeError, match="at least one training step, got none"):
        TrainingEmbeddings(OWNER, 3).encoded()


def test_are_those_of_the_training_steps():
    """In training mode, with augmentation, before the step changes the weights."""
    seen = {}

    class Record(Tiny):
        def embed(self, batch):
            pairs = super().embed(batch)
            if self.training:
                seen.update(zip(batch["text_id"].tolist(), pairs.text_embeddings.detach(), strict=True))
            return pairs

    miner = OfflineHardNegativeMining(texts_per_image=5, images_per_text=5, inject="batches", encode="training")
    L.Trainer(callbacks=[miner], max_epochs=2, **SILENT).fit(Record(), datamodule=tiny_data())
    kept = miner._mining.training_embeddings
    expected = torch.stack([seen[number] for number in range(len(seen))])
    torch.testing.assert_close(kept.rows[1].float(), expected, atol=HALF, rtol=0)
    assert kept.is_known.all()


def test_a_step_of_the_users_own_that_returns_none():
    class Own(Tiny):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)["loss"]

    miner = OfflineHardNegativeMining(inject="batches", encode="training")
    trainer = L.Trainer(callbacks=[miner], max_epochs=1, **SILENT)
    with pytest.raises(RuntimeError, match=r"`training_step` to return its embeddings .* or use `encode='pass'`"):
        trainer.fit(Own(), datamodule=tiny_data())
    with pytest.raises(RuntimeError, match="got Tensor"):
        step_embeddings(torch.zeros(()))


class TestSkippedSteps:
    def test_a_step_that_is_skipped_leaves_the_older_rows(self):
        class Skips(Tiny):
            def training_step(self, batch, batch_idx):
                return None if self.current_epoch == 1 else super().training_step(batch, batch_idx)

        class Keep(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                rows.append(miner._mining.training_embeddings.rows.clone())

        rows = []
        miner = OfflineHardNegativeMining(texts_per_image=5, images_per_text=5, inject="batches", encode="training")
        trainer = L.Trainer(callbacks=[miner, Keep()], max_epochs=2, **SILENT)
        with pytest.warns(UserWarning, match="returned `None`"):
            trainer.fit(Skips(), datamodule=tiny_data())
        assert torch.equal(*rows)
