import lightning as L
import pytest
from torch import nn

from lightning_itm import FalseNegativeElimination, TripletLoss
from tests.helpers.fit import fit
from tests.helpers.tiny import SILENT, Tiny


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queue_size": 0}, "`queue_size` to be an integer of at least 1, got 0"),
        ({"queue_size": 16.5}, "`queue_size` to be an integer of at least 1, got 16.5"),
        ({"momentum": 1.0}, r"`momentum` to be in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, r"`momentum` to be in \[0, 1\), got -0.1"),
        ({"start_epoch": -1}, "`start_epoch` to be an integer of at least 0, got -1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FalseNegativeElimination(**arguments)


def test_a_sampler_of_another_kind():
    with pytest.raises(TypeError, match=r"`sampler` to be a FalseNegativeSampler, got dict. Subclass it"):
        FalseNegativeElimination(sampler={"prior": 1e-4})


def test_a_loss_without_memory():
    class Own(nn.Module):
        def forward(self, pairs, candidates):
            return {"loss": pairs.image_embeddings.sum()}

    with pytest.raises(Exception, match=r"a loss that takes `memory`, got Own. Use TripletLoss"):
        fit(Tiny(Own()), None, FalseNegativeElimination(16))


def test_a_run_that_ends_before_it_starts():
    with pytest.warns(UserWarning, match=r"With `start_epoch=1` and `max_epochs=1`, no batch is ever compared"):
        fit(Tiny(TripletLoss()), None, FalseNegativeElimination(16, start_epoch=1), max_epochs=1)


def test_two_of_them():
    with pytest.raises(Exception, match="Expected one `FalseNegativeElimination`, got several"):
        fit(Tiny(TripletLoss()), None, FalseNegativeElimination(16), FalseNegativeElimination())


def test_a_module_that_is_no_dual_encoder():
    trainer = L.Trainer(callbacks=[FalseNegativeElimination()], **SILENT)
    with pytest.raises(Exception, match="Expected a `DualEncoder`, got LightningModule"):
        trainer.callbacks[0].setup(trainer, L.LightningModule(), "fit")
