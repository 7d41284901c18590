import lightning as L
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lightning_itm import FalseNegativeElimination, OfflineHardNegativeMining
from lightning_itm.callbacks._strategies import check_whole_weights
from tests.helpers.tiny import SILENT, Tiny


def trainer_with(strategy):
    trainer = L.Trainer(**SILENT)
    trainer._accelerator_connector.strategy = strategy  # by themselves they start on CUDA alone
    return trainer


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
@pytest.mark.parametrize("callback", [FalseNegativeElimination, OfflineHardNegativeMining])
def test_callbacks_refuse_sharded_weights(callback, strategy):
    message = f"whose ranks hold all weights, got {strategy.__name__}: .* of the whole module|with the whole module"
    with pytest.raises(MisconfigurationException, match=message):
        callback().setup(trainer_with(strategy()), Tiny(), "fit")


def test_whole_weights_pass():
    check_whole_weights(L.Trainer(**SILENT), "the slow copy is of the whole module")
