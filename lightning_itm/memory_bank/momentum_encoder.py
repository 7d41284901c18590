"""A slow copy of a module, whose embeddings stay comparable over many steps."""

import copy
from typing import Any

import torch
from torch import nn

from lightning_itm.embeddings import EmbeddingPairs


class MomentumEncoder(nn.Module):
    r"""Embed batches with a slow copy of a module, which follows its weights a little at each update.

    .. math:: \theta' \leftarrow \mu\,\theta' + (1 - \mu)\,\theta

    Here :math:`\theta` are the weights of the module, and :math:`\theta'` those of the copy. The embeddings of the copy
    change so little per step that those of some hundred steps ago can still be compared with those of today.

    The copy takes over the buffers of the module, such as batch statistics, where both have them in the same shape. Its other
    attributes stay what they were when it was made. The copy is always in eval mode, so that it changes no statistics and
    draws no dropout masks. Not in the paper.

    Args:
        module: A :class:`~lightning_itm.DualEncoder`, or any module with ``embed(batch)``. It is copied, and not kept.
        momentum: μ, the fraction of old weights that an update keeps, at least 0 and below 1. Usual: 0.99 for runs of some
            hundred steps, 0.999 for long ones. 0 makes the copy equal to the module at each update.

    Raises:
        ValueError: if ``momentum`` is outside [0, 1).
        TypeError: if the module cannot be copied, if it has trained weights of half precision (their average would stand
            still), or, at the first batch, if the copy runs weights of the module itself.

    Example:
        >>> import torch
        >>> from lightning_itm.memory_bank import MomentumEncoder
        >>> module = torch.nn.Linear(1, 1)
        >>> encoder = MomentumEncoder(module, momentum=0.75)
        >>> _ = torch.nn.init.ones_(module.weight), torch.nn.init.zeros_(encoder.module.weight)
        >>> encoder.update(module)
        >>> encoder.module.weight
        Parameter containing:
        tensor([[0.2500]])

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
        """Embed a batch, without gradient.

        Raises:
            TypeError: if the embeddings of the first batch come from weights of the module itself.
        """
        if self._is_checked:
            with torch.no_grad():
                return self._embed(batch)
        # With gradients this once. Nothing in the copy requires one, so embeddings that do were made with the module itself.
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
        """Move the weights towards those of the module, and take over its buffers.

        Args:
            module: The module that was copied, after an optimizer step.

        Raises:
            RuntimeError: if the module has gained or lost parameters since the copy was made.
        """
        live = dict(module.named_parameters())
        slow = dict(self.module.named_parameters())
        if live.keys() != slow.keys():
            raise RuntimeError(
                f"Expected the module to keep its parameters, got {sorted(live.keys() ^ slow.keys())[:4]} new or gone since "
                "the slow copy was made. Change modules before the fit, in `configure_model`."
            )
        # One call for all weights: a loop over hundreds of small tensors would start as many kernels.
        torch._foreach_lerp_([*slow.values()], [live[name] for name in slow], 1 - self.momentum)
        buffers = dict(module.named_buffers())
        for name, buffer in self.module.named_buffers():
            # Some are made late, or grow, such as a cache of positions. The copy keeps its own then.
            if name in buffers and buffers[name].shape == buffer.shape:
                buffer.copy_(buffers[name])


def check_momentum(momentum: float) -> None:
    """Raise a ValueError if ``momentum`` is not in [0, 1)."""
    if not 0 <= momentum < 1:
        raise ValueError(
            f"Expected `momentum` to be in [0, 1), got {momentum}. It is the fraction of old weights kept, such as 0.995."
        )
