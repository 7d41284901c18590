"""Which strategies a callback that runs the whole module by itself can work with."""

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy


def check_whole_weights(trainer: L.Trainer, reason: str) -> None:
    """Refuse strategies that shard the weights.

    Args:
        trainer: Whose strategy is looked at.
        reason: What needs all weights, for the message.

    Raises:
        MisconfigurationException: It does.
    """
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise MisconfigurationException(
            f"Expected a strategy whose ranks hold all weights, got {type(trainer.strategy).__name__}: {reason}. Use 'ddp'."
        )
