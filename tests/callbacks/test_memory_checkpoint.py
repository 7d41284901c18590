import lightning as L
import pytest

from lightning_itm import FalseNegativeElimination, TripletLoss
from tests.helpers.fit import fit
from tests.helpers.tiny import SILENT, Tiny, tiny_data

QUEUE_SIZE = 16


@pytest.fixture
def checkpoint(tmp_path):
    """Of a run with a queue of 16 pairs, whose embeddings are 16 wide."""
    run = fit(Tiny(TripletLoss()), None, FalseNegativeElimination(QUEUE_SIZE, start_epoch=1), max_epochs=2)
    run.trainer.save_checkpoint(tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def test_a_checkpoint_with_another_queue(checkpoint):
    fne = FalseNegativeElimination(queue_size=20)
    trainer = L.Trainer(callbacks=[fne], max_epochs=3, **SILENT)
    with pytest.raises(ValueError, match=r"a queue of 20 pairs, got one of 16 in the checkpoint.*`queue_size=16`"):
        trainer.fit(Tiny(TripletLoss()), datamodule=tiny_data(), ckpt_path=checkpoint, weights_only=True)


def test_a_checkpoint_with_another_width(checkpoint):
    """The same towers, but the embeddings are cut to half."""

    class Half(Tiny):
        def encode_image(self, image):
            return super().encode_image(image)[:, :8]

        def encode_text(self, text):
            return super().encode_text(text)[:, :8]

    trainer = L.Trainer(callbacks=[FalseNegativeElimination(QUEUE_SIZE)], max_epochs=3, **SILENT)
    with pytest.raises(ValueError, match=r"as wide as the queue's, 16, got 8"):
        trainer.fit(Half(TripletLoss()), datamodule=tiny_data(), ckpt_path=checkpoint, weights_only=True)
