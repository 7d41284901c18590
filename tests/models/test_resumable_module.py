import random

import lightning as L
import numpy as np
import torch
from torch import nn

from lightning_itm import DualEncoder
from tests.helpers.tiny import SILENT, Tiny, tiny_data


def test_only_a_fit_takes_the_random_streams_of_a_checkpoint(tmp_path):
    """A validation of a checkpoint must not set back the numbers that the program around it draws."""
    L.seed_everything(3, verbose=False)
    trainer = L.Trainer(**SILENT, max_epochs=1)
    trainer.fit(Tiny(), datamodule=tiny_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["rng"]
    assert torch.equal(saved["torch"], torch.get_rng_state())

    torch.manual_seed(9)
    random.seed(9)
    drawn = random.random()
    random.seed(9)
    model = Tiny()
    L.Trainer(**SILENT).validate(model, datamodule=tiny_data(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert model._restored_rng is None
    assert random.random() == drawn


def test_settings_are_saved_whatever_else_a_subclass_takes():
    """Lightning compares what is saved with every argument it finds, which an array or a module does not take."""

    class Own(DualEncoder):
        def __init__(self, classes, head, learning_rate=9.0):
            super().__init__(learning_rate=1e-3, warmup_steps=7)

    expected = {"learning_rate": 1e-3, "weight_decay": 0.1, "warmup_steps": 7, "chunk_size": None}
    model = Own(np.arange(3), nn.Linear(2, 2))
    assert dict(model.hparams) == dict(model.hparams_initial) == expected
