"""The strategies under which a callback can run the whole module by itself."""

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy


def check_whole_weights(trainer: L.Trainer, reason: str) -> None:
    """Refuse strategies that shard the weights.

    Args:
        trainer: The Trainer of the run. Its strategy is looked at.
        reason: What needs all weights. It ends the error message, such as "the slow copy is of the whole module".

    Raises:
        MisconfigurationException: if the strategy leaves each rank with a part of the weights.
    """
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise MisconfigurationException(
            f"Expected a strategy whose ranks hold all weights, got {type(trainer.strategy).__name__}: {reason}. Use 'ddp'."
        )
