"""Random numbers that a stopped run draws again: functions of a key, seeded streams, and streams that are restored."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]  # its integers are beyond what the compiler takes
def uniform(ids: Tensor, *key: int) -> Tensor:
    """Draw a number in [0, 1) for each id: the same on any device, in any batch and after a resume.

    Args:
        ids: What the numbers are for, integers `(rows,)`.
        key: What else they depend on, such as seed and epoch.

    Example:
        >>> import torch
        >>> bool((uniform(torch.tensor([5, 7]), 0, 1)[1:] == uniform(torch.tensor([7]), 0, 1)).all())
        True

    References:
        Steele et al., *Fast Splittable Pseudorandom Number Generators*, OOPSLA 2014 (the mixing function of SplitMix64).
    """
    x = ids.long()
    for value in key:
        x = _mix(x + _signed(_GAMMA * (value + 1)))
    return (_shifted(_mix(x), 40)).float() / (1 << 24)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Draw from streams that depend on the key alone, and leave the process's own streams (torch, numpy, random) as they are.

    Example:
        >>> with seeded(0, 3, 17):
        ...     first = torch.rand(())
        >>> with seeded(0, 3, 17):
        ...     bool(first == torch.rand(()))
        True
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def random_streams() -> dict[str, Any]:
    """Return the state of PyTorch's streams (CPU and current CUDA device), Python's and NumPy's: tensors and plain numbers."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }


def restore_random_streams(state: dict[str, Any]) -> None:
    """Go on as the state says."""
    version, words, gauss = state["python"]
    name, keys, *rest = state["numpy"]
    torch.set_rng_state(state["torch"].cpu())
    random.setstate((version, tuple(words), gauss))
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def part_random_streams(rank: int) -> None:
    """Let the other ranks draw other numbers than rank 0, whose streams a checkpoint has."""
    if rank > 0:
        seed = int(torch.randint(2**31, ())) + rank
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift to the right as if unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """Return the int64 with the same bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GAMMA = 0x9E3779B97F4A7C15
