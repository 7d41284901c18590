"""A slow copy of a module."""

import copy
from typing import Any

import torch
from torch import nn

from lightning_itm.embeddings import EmbeddingPairs


class MomentumEncoder(nn.Module):
    r"""Embed batches with weights that follow those of a module slowly.

    .. math:: \theta' \leftarrow \mu\,\theta' + (1 - \mu)\,\theta

    The copy is in eval mode (ours), so that it changes no statistics and draws no dropout masks. Its buffers are those of the
    module, as far as both have them in one shape. Other attributes stay what they were when it was made.

    Args:
        module: A :class:`~lightning_itm.DualEncoder`, or any module with ``embed(batch)``. It is copied, and not kept.
        momentum: μ, the share of old weights kept at an update.

    Raises:
        ValueError: ``momentum`` is outside [0, 1).
        TypeError: A module that cannot be copied; trained weights of half precision, whose average would stand still; or, at
            the first batch, a copy that runs weights of the module itself.

    References:
        He et al., *Momentum Contrast for Unsupervised Visual Representation Learning*, CVPR 2020, eq. 2.
    """

    def __init__(self, module: nn.Module, momentum: float = 0.995) -> None:
        super().__init__()
        check_momentum(momentum)
        trained = {parameter.dtype for parameter in module.parameters() if parameter.requires_grad}
        if half := trained & {torch.float16, torch.bfloat16}:
            raise TypeError(
                f"Expected float32 weights, got {half.pop()}: steps of {1 - momentum:g} would be lost to rounding. Train with "
                "`precision='bf16-mixed'` or '16-mixed'."
            )
        try:
            self.module = copy.deepcopy(module).eval().requires_grad_(False)
        except Exception as error:
            raise TypeError(
                f"Expected a {type(module).__name__} that can be copied, got: {error} Keep locks, loaders and tensors with "
                "gradient out of its attributes, or define `__deepcopy__`."
            ) from error
        self.momentum, self._is_checked = momentum, False

    def forward(self, batch: Any) -> EmbeddingPairs:
        """Embed a batch, without gradient."""
        if self._is_checked:
            with torch.no_grad():
                return self._embed(batch)
        # Nothing in the copy requires a gradient, so that one can come from the module itself alone.
        with torch.enable_grad():
            pairs = self._embed(batch)
        for name in ("image", "text"):
            if getattr(pairs, f"{name}_embeddings").requires_grad:
                raise TypeError(
                    f"Expected the copy of {type(self.module).__name__} to embed with its own weights; its {name} embeddings "
                    "come from those of the module itself. A function is bound to it, such as `self.encode_image = "
                    "torch.compile(self.encode_image)`, or a hook. Compile the submodules: `self.image_encoder.compile()`."
                )
        self._is_checked = True
        return pairs

    def _embed(self, batch: Any) -> EmbeddingPairs:
        return self.module.embed(batch)  # type: ignore[no-any-return, operator]

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards the weights of the module, and take over its buffers."""
        live = dict(module.named_parameters())
        slow = dict(self.module.named_parameters())
        if live.keys() != slow.keys():
            raise RuntimeError(
                f"Expected the module to keep its parameters, got {sorted(live.keys() ^ slow.keys())[:4]} new or gone since "
                "the slow copy was made. Change modules before the fit, in `configure_model`."
            )
        torch._foreach_lerp_([*slow.values()], [live[name] for name in slow], 1 - self.momentum)
        buffers = dict(module.named_buffers())
        for name, buffer in self.module.named_buffers():
            if name in buffers and buffers[name].shape == buffer.shape:
                buffer.copy_(buffers[name])


def check_momentum(momentum: float) -> None:
    """Raise a ValueError for a share that is none."""
    if not 0 <= momentum < 1:
        raise ValueError(
            f"Expected `momentum` to be in [0, 1), got {momentum}. It is the share of old weights kept, such as 0.995."
        )
