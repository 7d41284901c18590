"""Gather tensors from all ranks, with or without gradient."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes that train together. It is 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(x: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks, in the order of the ranks, without gradient.

    Args:
        x: The tensor of this rank, `(rows, ...)`. It must have the same shape on every rank. Pad it if it has not.

    Returns:
        A tensor `(ranks * rows, ...)`, the same on every rank. With one process, ``x`` without its gradient.

    Example:
        >>> import torch
        >>> from lightning_itm.distributed import gather
        >>> gather(torch.ones(2, requires_grad=True))
        tensor([1., 1.])
    """
    if world_size() == 1:
        return x.detach()
    x = x.detach().contiguous()  # the collective takes no view with strides
    gathered = x.new_empty(world_size() * x.shape[0], *x.shape[1:])  # (ranks * rows, ...)
    _collective("all_gather_single", "all_gather_into_tensor")(gathered, x)
    return gathered


def broadcast(x: Tensor, source: int) -> None:
    """Overwrite a tensor on every rank, in place, with that of one rank. Every rank must call it.

    Args:
        x: A contiguous tensor, of the same shape and dtype on every rank.
        source: The rank whose values all get. With one process nothing happens.
    """
    if world_size() > 1:
        # As bytes, which every backend can send, whatever the dtype.
        dist.broadcast(x.view(torch.uint8), source)


def of_first_rank(make: Callable[[], T]) -> T:
    """Return on every rank what a function returns on rank 0, where alone it is called. Every rank must call this.

    Args:
        make: A function without arguments. What it returns is pickled.

    Raises:
        ValueError: on every rank, if the function raises one.
        RuntimeError: on the other ranks, if the function raises any other error, which goes on on rank 0.
    """
    if world_size() == 1:
        return make()
    made: list[Any] = [None, None]
    raised: Exception | None = None
    if dist.get_rank() == 0:
        try:
            made[0] = make()
        except Exception as error:  # the others must not wait for what never comes
            raised, made[1] = error, (isinstance(error, ValueError), str(error))
    dist.broadcast_object_list(made, src=0)
    if raised is not None:
        raise raised
    if made[1] is not None:
        is_of_value, message = made[1]
        raise ValueError(message) if is_of_value else RuntimeError(f"Rank 0 failed: {message}")
    found: T = made[0]
    return found


def broadcast_all(tensors: Iterable[Tensor], source: int) -> None:
    """Overwrite tensors of any shape and stride on every rank, in place, with those of one rank. Every rank must call it."""
    _together(tensors, lambda flat: broadcast(flat, source))


def average(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors on every rank, in place, with their mean over the ranks. Every rank must call it.

    Args:
        tensors: Floating-point tensors, of the same shapes and dtypes on every rank.
    """

    def mean(flat: Tensor) -> None:
        dist.all_reduce(flat)
        flat /= world_size()

    _together(tensors, mean)


def _together(tensors: Iterable[Tensor], collective: Callable[[Tensor], None]) -> None:
    """Call a collective that works in place once for all tensors of a dtype and device."""
    if world_size() == 1:
        return
    kinds = dict[Any, list[Tensor]]()
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    for of_kind in kinds.values():
        flat = torch.cat([tensor.flatten() for tensor in of_kind])
        collective(flat)
        for tensor, part in zip(of_kind, flat.split([one.numel() for one in of_kind]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def gather_with_gradient(x: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks, and let gradients flow back to the rank that each row came from.

    A row may get a gradient on every rank. The rank that it came from receives the *sum* of these. If the loss of each rank is
    the mean over its own anchors, and DDP averages the gradients of the parameters over the ranks, the result is the gradient
    of one process on the global batch.

    Args:
        x: The tensor of this rank, `(rows, ...)`. It must have the same shape on every rank. Pad it if it has not.

    Returns:
        A tensor `(ranks * rows, ...)`, with gradient. With one process, ``x`` itself.
    """
    # Our own Function, because `torch.distributed.nn` is deprecated.
    return x if world_size() == 1 else _Gather.apply(x)


def _collective(name: str, old_name: str) -> Callable[..., Any]:
    # Looked up at each call: a PyTorch without torch.distributed has neither name, and must still import this file.
    function: Callable[..., Any] = getattr(dist, name if hasattr(dist, name) else old_name)  # renamed in torch 2.14
    return function


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # `grad` (ranks * rows, ...) has the rows of all ranks. Sum them over the ranks, and keep only the own ones.
        own_rows = grad.new_empty(grad.shape[0] // world_size(), *grad.shape[1:])
        _collective("reduce_scatter_single", "reduce_scatter_tensor")(own_rows, grad.contiguous())
        return own_rows
