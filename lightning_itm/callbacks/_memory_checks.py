"""What a memory bank needs of the module, its loss and the Trainer, and what can go wrong with it in a run."""

import inspect
from collections.abc import Callable, MutableMapping
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from lightning_itm.callbacks._strategies import check_whole_weights
from lightning_itm.memory_bank.false_negative_sampler import FalseNegativeSampler
from lightning_itm.memory_bank.momentum_encoder import check_momentum
from lightning_itm.memory_bank.queue import MemoryBank


def check_arguments(queue_size: int, momentum: float, start_epoch: int | None, sampler: object) -> None:
    """Check the arguments of the callback.

    Raises:
        ValueError: if ``queue_size``, ``momentum`` or ``start_epoch`` is out of its range.
        TypeError: if ``sampler`` is neither None nor a FalseNegativeSampler.
    """
    for name, value, least in (("queue_size", queue_size, 1), ("start_epoch", start_epoch or 0, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"Expected `{name}` to be an integer of at least {least}, got {value}.")
    check_momentum(momentum)
    if sampler is not None and not isinstance(sampler, FalseNegativeSampler):
        raise TypeError(
            f"Expected `sampler` to be a FalseNegativeSampler, got {type(sampler).__name__}. Subclass it for another rule."
        )


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
    # By the attribute and not by the class, which imports this file. Two banks would overwrite each other in the batch.
    names = [type(callback).__name__ for callback in trainer.callbacks if hasattr(callback, "agreement")]  # type: ignore[attr-defined]
    if len(names) > 1:
        raise MisconfigurationException(f"Expected one `FalseNegativeElimination`, got several: {names}. Keep one.")
    # A module without `loss` has a training step of its own. Whether that reads the memory shows after a batch.
    loss = getattr(pl_module, "loss", None)
    if loss is not None and not _takes_memory(loss):
        raise MisconfigurationException(
            f"Expected a loss that takes `memory`, got {type(loss).__name__}. Use TripletLoss, QuintupletLoss, "
            "InfoNCELoss, SigmoidLoss or a subclass of `PairLoss`."
        )


def check_is_dict(batch: Any) -> None:
    """Raise a TypeError if nothing can be put into the batch."""
    if not isinstance(batch, MutableMapping):
        raise TypeError(f"Expected the batch to be a dict, got {type(batch).__name__}. Let the dataset return dicts.")


def check_finite(trainer: L.Trainer, bank: MemoryBank) -> None:
    """Raise if the queue refused pairs. The host waits for the device.

    Raises:
        ValueError: if an embedding was not finite.
    """
    if (refused := int(bank.num_refused)) > 0:
        raise ValueError(
            f"Expected finite embeddings, got {refused} pairs with NaN or infinity by epoch {trainer.current_epoch}, step "
            f"{trainer.global_step}. They are not in the queue. Lower the learning rate, or clip gradients."
        )


def warn_if_never_active(trainer: L.Trainer, is_active: Callable[[int], bool], start_epoch: int | None) -> None:
    """Warn if the run ends before its batches are compared with the memory bank."""
    epochs = range(max(trainer.max_epochs or 0, 0))  # none where `max_steps` or `max_time` ends the run
    if epochs and not trainer.fast_dev_run and not any(map(is_active, epochs)):  # type: ignore[attr-defined]
        rank_zero_warn(
            f"With `start_epoch={start_epoch}` and `max_epochs={trainer.max_epochs}`, no batch is ever compared with "
            "the memory bank. For a run of one epoch, set `start_epoch=0` or leave it out."
        )


def warn_of_unused_memory(pl_module: L.LightningModule) -> None:
    """Warn that the loss did not read ``batch["memory"]``."""
    rank_zero_warn(
        f"The memory bank is not used: nothing asked its sampler in `{type(pl_module).__name__}.training_step`. Pass "
        "`memory=batch['memory']` on to the loss."
    )


def warn_of_lost_agreement() -> None:
    """Warn that the memory bank was in the loss, and left it."""
    rank_zero_warn(
        "The memory bank has left the loss: its embeddings no longer agree with the live model (see "
        "`memory/live_in_stored` and `memory/stored_in_stored`). It comes back when they do. Lower the learning rate, "
        "or lower `momentum`, so that the slow copy follows faster."
    )


def _takes_memory(loss: Any) -> bool:
    parameters = inspect.signature(getattr(loss, "forward", loss)).parameters.values()
    return any(one.name == "memory" or one.kind is one.VAR_KEYWORD for one in parameters)
