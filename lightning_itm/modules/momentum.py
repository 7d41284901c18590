"""A slow copy of a module."""

import copy
from typing import Any

import torch
from torch import nn

from lightning_itm.data.batch import EmbeddingPairs


class MomentumEncoder(nn.Module):
    r"""Embed batches with weights that follow those of a module slowly.

    .. math:: \theta' \leftarrow \mu\,\theta' + (1 - \mu)\,\theta

    The copy is in eval mode (ours), so that it changes no statistics and draws no dropout masks. Its buffers are those of the
    module.

    Args:
        module: A :class:`~lightning_itm.DualEncoder`, or any module with ``embed(batch)``. It is copied, and not kept.
        momentum: μ, the share of old weights kept at an update.

    Raises:
        ValueError: ``momentum`` is outside [0, 1).
        TypeError: Weights of half precision, whose average would stand still; or a module whose ``embed`` or encoders are
            bound to the module itself, so that a copy would run the wrong weights.

    References:
        He et al., *Momentum Contrast for Unsupervised Visual Representation Learning*, CVPR 2020, eq. 2.
    """

    def __init__(self, module: nn.Module, momentum: float = 0.995) -> None:
        super().__init__()
        check_momentum(momentum)
        bound = [name for name in vars(module) if name == "embed" or name.startswith("encode_")]
        if bound:
            raise TypeError(
                f"Expected `{bound[0]}` to be a method of {type(module).__name__}, got an attribute of this one object, such "
                "as `torch.compile` returns: a copy would run the live weights. Compile the submodules instead, as in "
                "`self.image_encoder.compile()`."
            )
        half = {parameter.dtype for parameter in module.parameters()} & {torch.float16, torch.bfloat16}
        if half:
            raise TypeError(
                f"Expected float32 weights, got {half.pop()}: steps of {1 - momentum:g} would be lost to rounding. Train with "
                "`precision='bf16-mixed'` or '16-mixed'."
            )
        self.momentum = momentum
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, batch: Any) -> EmbeddingPairs:
        """Embed a batch, without gradient."""
        return self.module.embed(batch)  # type: ignore[no-any-return, operator]

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards the weights of the module, and take over its buffers."""
        torch._foreach_lerp_([*self.module.parameters()], [*module.parameters()], 1 - self.momentum)
        for buffer, of_module in zip(self.module.buffers(), module.buffers(), strict=True):
            buffer.copy_(of_module)


def check_momentum(momentum: float) -> None:
    """Raise a ValueError for a share that is none."""
    if not 0 <= momentum < 1:
        raise ValueError(
            f"Expected `momentum` to be in [0, 1), got {momentum}. It is the share of old weights kept, such as 0.995."
        )
