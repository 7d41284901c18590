"""What a memory bank needs of the module, its loss and the Trainer."""

import inspect
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_itm.callbacks._strategies import check_whole_weights


def check_memory_fits(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Check, before a fit, that a slow copy can be made and that the loss takes its candidates.

    Raises:
        MisconfigurationException: if the strategy shards the weights, the module has no ``embed``, there is more than one
            callback of this kind, or the loss takes no ``memory``.
    """
    check_whole_weights(trainer, "the slow copy is of the whole module")
    if not hasattr(pl_module, "embed"):
        raise MisconfigurationException(
            f"Expected a `DualEncoder`, got {type(pl_module).__name__}: the slow copy is asked to `embed` batches."
        )
    names = [type(callback).__name__ for callback in trainer.callbacks if hasattr(callback, "agreement")]  # type: ignore[attr-defined]
    if len(names) > 1:
        raise MisconfigurationException(f"Expected one `FalseNegativeElimination`, got several: {names}. Keep one.")
    loss = getattr(pl_module, "loss", None)
    if loss is not None and not _takes_memory(loss):
        raise MisconfigurationException(
            f"Expected a loss that takes `memory`, got {type(loss).__name__}. Use TripletLoss, QuintupletLoss, "
            "InfoNCELoss, SigmoidLoss or a subclass of `PairLoss`."
        )


def _takes_memory(loss: Any) -> bool:
    parameters = inspect.signature(getattr(loss, "forward", loss)).parameters.values()
    return any(one.name == "memory" or one.kind is one.VAR_KEYWORD for one in parameters)
