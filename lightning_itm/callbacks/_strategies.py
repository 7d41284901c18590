"""The strategies under which a callback can run the whole module by itself."""

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from lightning_itm.distributed import gather
from lightning_itm.sharded_weights import check_parallel_over_data

_SHARDED = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)


def check_whole_weights(trainer: L.Trainer, reason: str) -> None:
    """Refuse strategies that shard the weights.

    Args:
        trainer: The Trainer of the run. Its strategy is looked at.
        reason: What needs all weights. It ends the error message, such as "the slow copy is of the whole module".

    Raises:
        MisconfigurationException: if the strategy leaves each rank with a part of the weights.
    """
    if isinstance(trainer.strategy, _SHARDED):
        raise MisconfigurationException(
            f"Expected a strategy whose ranks hold all weights, got {type(trainer.strategy).__name__}: {reason}. Use 'ddp'."
        )


def check_reachable_weights(trainer: L.Trainer, reason: str) -> None:
    """Refuse strategies that shard the weights, but FSDP2, whose modules gather theirs wherever they are called.

    Args:
        trainer: The Trainer of the run, whose processes are started by now.
        reason: What needs the weights, such as "mining encodes with the whole module".

    Raises:
        MisconfigurationException: if the strategy is FSDP1, DeepSpeed or tensor parallel.
    """
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
        raise MisconfigurationException(
            f"Expected a strategy whose ranks hold all weights, or FSDP2, got {type(trainer.strategy).__name__}: {reason}. "
            "Use 'ddp'. If a device has no room for the weights, use `ModelParallelStrategy(data_parallel_size="
            f"{trainer.world_size}, tensor_parallel_size=1)`, and call `fully_shard` for each tower in `configure_model`."
        )
    check_parallel_over_data(trainer)


def check_equal_batches(trainer: L.Trainer, device: torch.device) -> None:
    """Refuse to predict where ranks would wait for each other for ever. Every rank must call it, in ``on_predict_start``.

    Args:
        trainer: The Trainer, which has counted the batches of this rank.
        device: That of the module.

    Raises:
        MisconfigurationException: if the strategy shards the weights, and one rank has more batches than another.
    """
    if not isinstance(trainer.strategy, _SHARDED):
        return
    numbers: Tensor = gather(torch.tensor([trainer.num_predict_batches], device=device))  # (ranks, loaders)
    if bool((numbers != numbers[0]).any()):
        raise MisconfigurationException(
            f"Expected as many batches on each rank with {type(trainer.strategy).__name__}, where all ranks encode together, "
            f"got {numbers.T.tolist()} (images, then texts). Take another `eval_batch_size`, or one process."
        )
