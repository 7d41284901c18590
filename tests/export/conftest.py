import lightning as L
import pytest
import torch

from tests.helpers.tiny import SILENT


@pytest.fixture
def save(tmp_path):
    """Save a module as a Trainer does. Entries of the checkpoint can be replaced, or left out (None)."""

    def save(module, name="a.ckpt", **changes):
        trainer = L.Trainer(**SILENT)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(tmp_path / name)
        saved = torch.load(tmp_path / name, weights_only=True) | changes
        torch.save({key: value for key, value in saved.items() if value is not None}, tmp_path / name)
        return tmp_path / name

    return save
