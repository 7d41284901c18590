import random

import lightning as L
import torch

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
