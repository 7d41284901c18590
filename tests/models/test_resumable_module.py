import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from lightning_itm import (
    DualEncoder,
    FalseNegativeElimination,
    FalseNegativeSampler,
    InfoNCELoss,
    OfflineHardNegativeMining,
    QuintupletLoss,
    ResidualVSE,
    SigmoidLoss,
    TripletLoss,
)
from lightning_itm.losses import loss_settings
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


class SaveWeights(Callback):
    def on_train_end(self, trainer, pl_module):
        state = {"weights": pl_module.state_dict(), "streams": torch.get_rng_state()}
        torch.save(state, f"end-{trainer.global_rank}.pt")


@pytest.mark.forks
@pytest.mark.parametrize("at_step", [6, 3], ids=["end of an epoch", "in the middle"])
def test_two_processes_go_on_where_they_stopped(at_step):
    """Dropout and noise of both ranks, mined samples and the bank: all weights bit for bit."""
    ends = {}
    for ckpt_path in (None, f"step={at_step}.ckpt"):
        L.seed_everything(3 if ckpt_path is None else 4, verbose=False)
        mining = OfflineHardNegativeMining(texts_per_image=12, images_per_text=8, start_epoch=1)
        bank = FalseNegativeElimination(16, sampler=FalseNegativeSampler(min_count=4))
        saving = ModelCheckpoint(".", "{step}", save_top_k=-1, every_n_train_steps=3)
        options = {**SILENT, "enable_checkpointing": True, "max_epochs": 3, "devices": 2, "strategy": "ddp_fork"}
        trainer = L.Trainer(callbacks=[mining, bank, saving, SaveWeights()], **options)
        trainer.fit(Tiny(), datamodule=tiny_data(), ckpt_path=ckpt_path, weights_only=True)
        ends[ckpt_path] = [torch.load(f"end-{rank}.pt") for rank in range(2)]
    for whole, resumed in zip(*ends.values(), strict=True):
        assert whole["weights"].keys() == resumed["weights"].keys()
        assert all(torch.equal(whole["weights"][name], value) for name, value in resumed["weights"].items())
        assert torch.equal(whole["streams"], resumed["streams"])
    assert not torch.equal(ends[None][0]["streams"], ends[None][1]["streams"])


class Fixed(DualEncoder):
    """Gives the base a loss by itself, and takes all other options."""

    def __init__(self, margin=0.1, **kwargs):
        super().__init__(TripletLoss(margin), **kwargs)
        self.image_encoder = self.text_encoder = nn.Linear(2, 2)


class SetLater(DualEncoder):
    def __init__(self, margin=0.1, **kwargs):
        super().__init__(**kwargs)
        self.image_encoder = self.text_encoder = nn.Linear(2, 2)
        self.loss = TripletLoss(margin)


class OwnTriplet(TripletLoss):
    pass


class TestLossOfACheckpoint:
    def save(self, module, path):
        trainer = L.Trainer(**SILENT)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(path, weights_only=True)
        return path

    @pytest.mark.parametrize(
        "loss",
        [
            SigmoidLoss(2.0, -3.0, hardness=2.0),
            QuintupletLoss(TripletLoss(0.3, "selective"), alpha=0.2),
            InfoNCELoss(),
        ],
        ids=lambda loss: type(loss).__name__,
    )
    def test_is_made_again(self, loss, tmp_path):
        path = self.save(Tiny(loss), tmp_path / "a.ckpt")
        loaded = Tiny.load_from_checkpoint(path, weights_only=True)
        assert loss_settings(loaded.loss) == loss_settings(loss)
        assert all(torch.equal(value, loaded.loss.state_dict()[name]) for name, value in loss.state_dict().items())
        again = Tiny.load_from_checkpoint(self.save(loaded, tmp_path / "b.ckpt"), weights_only=True)
        assert loss_settings(again.loss) == loss_settings(loss)

    def test_is_made_again_in_a_class_with_another_default(self, tmp_path):
        sizes = {"vocab_size": 5, "image_dim": 4, "embed_dim": 4, "word_dim": 4}
        assert loss_settings(ResidualVSE(**sizes).loss)["negatives"] == "selective"
        path = self.save(ResidualVSE(**sizes, loss=SigmoidLoss(hardness=2.0)), tmp_path / "a.ckpt")
        assert loss_settings(ResidualVSE.load_from_checkpoint(path).loss)["hardness"] == 2.0

    def test_does_not_replace_what_was_given(self, tmp_path):
        path = self.save(Tiny(TripletLoss(0.3)), tmp_path / "a.ckpt")
        assert Tiny.load_from_checkpoint(path, loss=TripletLoss(0.4)).loss.margin == 0.4

    @pytest.mark.parametrize("kind", [Fixed, SetLater])
    def test_does_not_replace_what_the_class_gives(self, kind, tmp_path):
        path = self.save(kind(margin=0.3), tmp_path / "a.ckpt")
        assert kind.load_from_checkpoint(path, margin=0.4).loss.margin == 0.4

    def test_of_ones_own_is_needed_again(self, tmp_path):
        path = self.save(Tiny(OwnTriplet(0.3)), tmp_path / "a.ckpt")
        assert torch.load(path, weights_only=True)["loss"] is None
        with pytest.raises(
            RuntimeError, match=r"another loss was trained. Pass it, as in `load_from_checkpoint\(path, loss"
        ):
            Tiny.load_from_checkpoint(path)
        assert Tiny.load_from_checkpoint(path, loss=OwnTriplet(0.3)).loss.margin == 0.3

    def test_of_a_run_is_not_replaced(self, tmp_path):
        path = self.save(Tiny(TripletLoss(0.3)), tmp_path / "a.ckpt")
        model = Tiny()
        with pytest.raises(RuntimeError, match="another loss was trained"):
            L.Trainer(**SILENT).validate(model, datamodule=tiny_data(), ckpt_path=path, verbose=False)
        assert isinstance(model.loss, InfoNCELoss)

    def test_names_the_class(self, tmp_path):
        saved = torch.load(self.save(Tiny(), tmp_path / "a.ckpt"), weights_only=True)
        assert saved["class_path"] == "tests.helpers.tiny.Tiny"
