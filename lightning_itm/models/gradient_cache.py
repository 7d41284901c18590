"""Gradient caching, for batches whose activations do not fit into memory."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from lightning_itm.data.batch import PaddedSequence
from lightning_itm.randomness import random_streams, restore_random_streams


def encode_in_chunks(encode: Callable[[Any], Tensor], inputs: Any, chunk_size: int | None) -> Tensor:
    """Encode a batch in chunks, so that the activations of only one chunk are in memory.

    In plain terms: the forward pass keeps only the vectors of each chunk. The backward pass encodes the chunk again when it
    needs the activations. The loss sees the vectors of the whole batch, so the gradient equals that of one pass, up to
    rounding. Dropout, and whatever else ``encode`` draws from PyTorch, Python or NumPy, is drawn alike both times.

    The price is one more forward pass of each trained encoder. What ``encode`` changes as a side effect, such as the running
    statistics of BatchNorm, it changes twice.

    Args:
        encode: A function from rows to one vector per row, `(rows, dim)`.
        inputs: The rows to encode: a tensor, a list, a :class:`~lightning_itm.data.PaddedSequence`, or a mapping of these,
            which ``encode`` gets as a dict.
        chunk_size: The largest number of rows at once, such as 64. The chunks are as equal in size as possible. Default: all
            rows in one pass, and nothing is encoded twice.

    Raises:
        TypeError: if the inputs are of another type.
        ValueError: if the values of a mapping do not all have the same number of rows.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_itm.models.gradient_cache import encode_in_chunks
        >>> encode_in_chunks(nn.Flatten(), torch.ones(5, 2, 1), 2).shape
        torch.Size([5, 2])

    References:
        Gao et al., *Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup*, RepL4NLP 2021, arXiv 2101.06983.
        There, a pass without gradient is followed by the loss on detached vectors, then by a forward and a backward pass of a
        chunk, which takes a training loop of its own. Here autograd encodes a chunk again when it needs its activations
        (``torch.utils.checkpoint``): one ``backward()``, automatic optimization, one gradient reduction over processes.
    """
    if chunk_size is None:
        return encode(inputs)
    num_rows = _num_rows(inputs)
    num_chunks = max(1, -(-num_rows // chunk_size))
    # Chunks of 5, 5 and 6 rather than 7, 7 and 2: a last chunk of one row would have no batch statistics.
    ends = [num_rows * number // num_chunks for number in range(num_chunks + 1)]
    chunks = [_rows(inputs, slice(*ends[number : number + 2])) for number in range(num_chunks)]
    # Without a gradient nothing is encoded again, so nothing has to be kept for it either.
    if not torch.is_grad_enabled():
        return torch.cat([encode(chunk) for chunk in chunks])
    return torch.cat([_checkpointed(encode, chunk) for chunk in chunks])


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise a ValueError if the size is not a positive integer or None."""
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(
            f"Expected `chunk_size` to be a positive integer, got {chunk_size!r}. It is the number of rows encoded at once, "
            "such as 64; None encodes the whole batch."
        )


def warn_of_batch_norm(module: nn.Module, chunk_size: int | None) -> None:
    """Warn where chunks change the result, which they do with batch statistics that are not frozen."""
    names = [name for name, part in module.named_modules() if isinstance(part, _BatchNorm) and part.training]
    if chunk_size is not None and names:
        rank_zero_warn(
            f"`chunk_size={chunk_size}` with BatchNorm in training mode, {len(names)} of them, such as `{names[0]}`: each "
            "normalises over a chunk instead of the batch, and its running statistics take in every chunk twice. Freeze them "
            "(`.eval()`; `lock_image=True`), or use another norm."
        )


def _num_rows(inputs: Any) -> int:
    # An empty mapping has no number of rows and goes on to the error below.
    if isinstance(inputs, Mapping) and inputs:
        numbers = {key: _num_rows(value) for key, value in inputs.items()}
        if len(set(numbers.values())) > 1:
            raise ValueError(
                f"Expected as many rows in all of {list(numbers)}, got {numbers}. Leave out what has none."
            )
        return next(iter(numbers.values()))
    if isinstance(inputs, Tensor | list | PaddedSequence):
        return len(inputs)
    raise TypeError(
        "Expected images and texts that can be split into rows for `chunk_size`: a tensor, a list, a PaddedSequence or a dict "
        f"of these, got {type(inputs).__name__}. Collate them to one of these, or leave `chunk_size` None."
    )


def _rows(inputs: Any, rows: slice) -> Any:
    if isinstance(inputs, Mapping):
        return {key: _rows(value, rows) for key, value in inputs.items()}
    if isinstance(inputs, PaddedSequence):
        return PaddedSequence(inputs.values[rows], inputs.lengths[rows])
    return inputs[rows]


@torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]  # random streams cannot be compiled; encoders can
def _checkpointed(encode: Callable[[Any], Tensor], chunk: Any) -> Any:
    # PyTorch itself restores its own streams alone, and only on the devices of arguments that are tensors.
    return checkpoint(encode, chunk, use_reentrant=False, context_fn=_same_draws)


def _same_draws() -> tuple[Any, Any]:
    """Return the contexts of the two passes."""
    # Called before the first pass, so these are the streams that it begins with.
    return nullcontext(), _replayed(random_streams())


@contextmanager
def _replayed(then: dict[str, Any]) -> Iterator[None]:
    # The streams of the backward pass are put back after it: the next step must not depend on the number of chunks.
    now = random_streams()
    restore_random_streams(then)
    try:
        yield
    finally:
        restore_random_streams(now)
