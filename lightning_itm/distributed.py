"""Gather tensors over all ranks, with gradient and without."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(x: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks, in the order of the ranks, without gradient.

    Args:
        x: `(rows, ...)`, with the same shape on every rank.

    Returns:
        `(ranks * rows, ...)`; ``x`` itself where there is one process.
    """
    if world_size() == 1:
        return x.detach()
    x = x.detach().contiguous()
    gathered = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
    _collective("all_gather_single", "all_gather_into_tensor")(gathered, x)
    return gathered


def gather_with_gradient(x: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks; each rank gets back the gradients that all ranks have for its rows.

    The gradients of the ranks are *summed*. Where every rank's loss is the mean over its own anchors, and the parameters'
    gradients are averaged over the ranks, as DDP does, the result is the gradient of one process on the global batch.

    Args:
        x: `(rows, ...)`, with the same shape on every rank.

    Returns:
        `(ranks * rows, ...)`; ``x`` itself where there is one process.
    """
    return x if world_size() == 1 else _Gather.apply(x)


def _collective(name: str, old_name: str) -> Callable[..., Any]:
    # Looked up at each call: a PyTorch without torch.distributed has neither name, and imports this file all the same.
    function: Callable[..., Any] = getattr(dist, name if hasattr(dist, name) else old_name)  # renamed in torch 2.14
    return function


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        own = grad.new_empty(grad.shape[0] // world_size(), *grad.shape[1:])
        _collective("reduce_scatter_single", "reduce_scatter_tensor")(own, grad.contiguous())
        return own
