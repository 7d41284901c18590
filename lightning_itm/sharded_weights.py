"""Weights that FSDP2 (``fully_shard``) splits over the ranks: which these are, and how they are whole for a moment.

FSDP2 gathers the weights of a module when its ``forward`` is called, and splits them again afterwards or in the backward pass.
In between, each parameter is a ``DTensor``, of which a rank holds a part. All ranks must call such a module equally often,
because each call waits for the others.
"""

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

_FSDP2: Any = None
"""``torch.distributed.fsdp`` where it has FSDP2, which is from torch 2.6 on."""
_PART: tuple[Any, ...] = ()
if torch.distributed.is_available():
    import torch.distributed.fsdp as _fsdp

    if hasattr(_fsdp, "FSDPModule"):
        from torch.distributed.tensor import DTensor, Partial, Replicate

        _FSDP2, _PART = _fsdp, (DTensor,)


def is_part(tensor: Tensor) -> bool:
    """Return whether this rank holds a part of the tensor only."""
    return isinstance(tensor, _PART)


def sharded_modules(module: nn.Module) -> list[Any]:
    """Return the parts of a module, or itself, that ``fully_shard`` was called with. Their weights may be whole by now."""
    return [] if _FSDP2 is None else [part for part in module.modules() if isinstance(part, _FSDP2.FSDPModule)]


def split_again(module: nn.Module) -> None:
    """Let each rank keep its part of the weights only. After a pass without gradient, FSDP2 itself keeps some whole."""
    for part in sharded_modules(module):
        part.reshard()


def whole_tensors(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a module with weights that are split, which are not. Without such weights: none."""
    if not sharded_modules(module):
        return []
    split_again(module)
    return [one for one in (*module.parameters(), *module.buffers()) if not is_part(one)]


def gathering(encode: Callable[..., Any]) -> Callable[..., Any]:
    """Return an encoder that gathers the weights of its module, as ``forward`` does.

    Args:
        encode: A function. If it is a method of a module that ``fully_shard`` was called with, such as ``encode_image``, FSDP2
            would not gather the parameters that the module holds directly. Other functions are returned as they are.
    """
    owner, name = getattr(encode, "__self__", None), getattr(encode, "__name__", "")
    if (
        _FSDP2 is None or not isinstance(owner, _FSDP2.FSDPModule) or name in vars(owner)
    ):  # the last: registered already
        return encode
    _FSDP2.register_fsdp_forward_method(owner, name)
    gathers: Callable[..., Any] = getattr(owner, name)
    delattr(owner, name)  # the module stays as the user made it
    return gathers


def whole_norms(norms: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the norms of whole tensors. Every rank must call it, with the same tensors.

    Args:
        norms: The L2 norm of what this rank holds of each tensor, scalars.
        tensors: The tensors that the norms are of. Those that no rank shares keep their norm.
    """
    whole, groups = list(norms), dict[Any, list[int]]()
    for index, tensor in enumerate(tensors):
        if is_part(tensor):
            of: Any = tensor
            groups.setdefault((of.device_mesh, of.placements), []).append(index)
    for (mesh, placements), indices in groups.items():
        # As float64: the square of a norm that vanishes is below what float32 holds.
        squares = torch.stack([norms[index] for index in indices]).double().square()
        sums = [Partial() if placement.is_shard() else Replicate() for placement in placements]
        reduced = DTensor.from_local(squares, mesh, sums, run_check=False).full_tensor().sqrt()
        for index, norm in zip(indices, reduced.to(norms[0].dtype).unbind(), strict=True):
            whole[index] = norm
    return whole


def clip_gradients(gradients: Sequence[Tensor], most: float, *, by_value: bool = False) -> None:
    """Clip gradients in place, of which some may be split over the ranks and some not. Every rank must call it.

    Args:
        gradients: Those of all parameters that the optimizer trains. Whole ones are the same on every rank.
        most: The L2 norm that all of them together may have, or the largest absolute value of an element.
        by_value: Clip each element.

    References:
        ``torch.nn.utils.clip_grad_norm_``, which takes gradients that are all split, or all whole.
    """
    if not gradients:
        return
    shared: list[Any] = list(gradients)
    own = [one.to_local() if is_part(one) else one for one in shared]
    if by_value:
        for part in own:
            part.clamp_(-most, most)
        return
    norms = whole_norms(torch._foreach_norm(own, 2, torch.float32), gradients)
    factor = (most / (torch.stack(norms).norm() + 1e-6)).clamp_max(1)
    for part in own:
        part.mul_(factor.to(part.dtype))


def check_parallel_over_data(trainer: L.Trainer) -> None:
    """Refuse tensor parallelism, and an FSDP2 that is older than its public names.

    Args:
        trainer: The Trainer of the run, whose processes are started by now.

    Raises:
        MisconfigurationException: if several ranks must see the same data.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return
    if _FSDP2 is None:
        raise MisconfigurationException(
            f"Expected torch 2.6 or newer with ModelParallelStrategy, got {torch.__version__}, which has no public "
            "`torch.distributed.fsdp.fully_shard`. Use 'ddp', or a newer torch."
        )
    size = strategy.device_mesh["tensor_parallel"].size()
    if size > 1:
        raise MisconfigurationException(
            f"Expected ModelParallelStrategy(tensor_parallel_size=1), got {size}: pairs are divided over all ranks, and those "
            "of one tensor parallel group would need the same. Split the weights with `fully_shard` alone: "
            f"data_parallel_size={trainer.world_size}, tensor_parallel_size=1."
        )
