"""What a checkpoint holds of a memory bank: the slow copy, the queue, the statistics and the agreement."""

from typing import Any

import lightning as L

from lightning_itm.identity import identity_of, set_difference
from lightning_itm.memory_bank.agreement import Agreement
from lightning_itm.memory_bank.false_negative_sampler import FalseNegativeSampler
from lightning_itm.memory_bank.momentum_encoder import MomentumEncoder
from lightning_itm.memory_bank.queue import MemoryBank

CHECKPOINT_KEY = "false_negative_elimination"
VERSION = 2  # 1 had no agreement


def memory_state(
    encoder: MomentumEncoder,
    bank: MemoryBank | None,
    sampler: FalseNegativeSampler,
    agreement: Agreement,
    queue_size: int,
    trainer: L.Trainer,
) -> dict[str, Any]:
    """Collect the state of the parts, for a checkpoint that loads with ``weights_only=True``."""
    return {
        "encoder": encoder.module.state_dict(),
        "bank": None if bank is None else bank.state_dict(),
        "sampler": sampler.state_dict(),
        "agreement": agreement.state_dict(),
        "version": VERSION,
        "queue_size": queue_size,
        "set": _training_set(trainer),
    }


def restore_memory(
    state: dict[str, Any],
    encoder: MomentumEncoder,
    sampler: FalseNegativeSampler,
    agreement: Agreement,
    *,
    strict: bool,
) -> MemoryBank | None:
    """Load the state of a checkpoint into the parts, and return its queue if it has one.

    Args:
        state: What :func:`memory_state` returned, in this version or an older one.
        encoder: The slow copy to load into, on the device of the run.
        sampler: The sampler to load into. Its statistics go on.
        agreement: The agreement to load into. Older checkpoints have none, and then it is followed anew.
        strict: Whether the weights must have exactly the keys of the slow copy. Give the module's ``strict_loading``.
    """
    encoder.module.load_state_dict(state["encoder"], strict=strict)
    sampler.load_state_dict(state["sampler"])
    if "agreement" in state:
        agreement.load_state_dict(state["agreement"])
    if state["bank"] is None:
        return None
    image = state["bank"]["image"]
    bank = MemoryBank(*image.shape).to(image.dtype)  # before the load, which would round float64
    bank.load_state_dict(state["bank"])
    return bank


def check_memory_state(state: dict[str, Any], queue_size: int, trainer: L.Trainer) -> None:
    """Raise if the queue of a checkpoint does not fit the run.

    Args:
        state: What :func:`memory_state` returned.
        queue_size: The size of the queue of this run.
        trainer: The Trainer of this run. With a data module, its training set must be the same, because the queue has ids.

    Raises:
        ValueError: if the sizes differ, because pairs would have to be dropped, or places would stay empty. Also if the
            training set differs.
    """
    difference = set_difference(state.get("set", {}), _training_set(trainer))
    if difference is not None:
        raise ValueError(
            f"Expected the checkpoint's memory bank to be of this training set, got that of another: it has {difference}. An "
            "image in the bank would be taken for another one. Resume with the same data, or start from the weights alone "
            "(`load_from_checkpoint`)."
        )
    if state["queue_size"] != queue_size:
        raise ValueError(
            f"Expected a queue of {queue_size} pairs, got one of {state['queue_size']} in the checkpoint. "
            f"Resume with `queue_size={state['queue_size']}`, or start from the weights alone (`load_from_checkpoint`)."
        )


def _training_set(trainer: L.Trainer) -> dict[str, Any]:
    return identity_of(getattr(trainer.datamodule, "train_dataset", None))  # type: ignore[attr-defined]
