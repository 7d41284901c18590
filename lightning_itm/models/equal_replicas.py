"""A LightningModule that keeps equal on all ranks what FSDP2 does not split."""

from typing import Any

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_itm.distributed import average, broadcast_all
from lightning_itm.sharded_weights import check_parallel_over_data, clip_gradients, is_part, split_again, whole_tensors


class EqualReplicas(L.LightningModule):
    """Do under ``ModelParallelStrategy`` what DDP does for weights and buffers that each rank holds as a whole.

    FSDP2 takes care of the modules that ``fully_shard`` was called with. Of the others, each rank has a replica: the
    ``logit_scale`` of a loss, which is a scalar and can't be split, or a tower that is small. Nothing else would give them
    the same gradients, nor BatchNorm the same statistics. Call ``super()`` where you override one of these hooks.
    """

    def setup(self, stage: str) -> None:
        """Split weights again that an earlier run left whole, before an optimizer is made of them."""
        split_again(self)

    def on_fit_start(self) -> None:
        """Begin with the weights of rank 0.

        Raises:
            MisconfigurationException: if the ranks are parallel in another way than over the data.
        """
        check_parallel_over_data(self.trainer)
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            broadcast_all(whole_tensors(self), 0)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip as Lightning does, also where only a part of the gradients is split, which PyTorch does not clip by itself."""
        parameters = (one for group in optimizer.param_groups for one in group["params"])
        gradients = [one.grad for one in parameters if one.grad is not None]
        if gradient_clip_val and any(is_part(gradient) for gradient in gradients):
            clip_gradients(gradients, gradient_clip_val, by_value=gradient_clip_algorithm == "value")
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_after_backward(self) -> None:
        """Average the gradients over the ranks, and take over the buffers of rank 0.

        What is not split must have a gradient on all ranks, or on none of them.
        """
        # Once per batch. In a window of several, the part of the earlier ones is equal already, and the mean keeps it.
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            gradients = [one.grad for one in self.parameters() if one.grad is not None]
            average([gradient for gradient in gradients if not is_part(gradient)])
            broadcast_all(self.buffers(), 0)  # now, because the next checkpoint has those of any rank
