"""Random numbers that a stopped run draws again.

Three kinds: numbers that are functions of a key (:func:`uniform`), streams that start from a key (:func:`seeded`), and the
process's own streams, saved and restored (:func:`random_streams`).
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]  # its integers are beyond what the compiler takes
def uniform(ids: Tensor, *key: int) -> Tensor:
    """Draw a number in [0, 1) for each id. It is the same on any device, in any batch and after a resume.

    Args:
        ids: The ids that get a number, such as those of texts, integers `(rows,)`.
        key: Integers that the numbers also depend on, such as seed and epoch. Other integers give other numbers.

    Returns:
        Numbers, float32 `(rows,)`.

    Example:
        >>> import torch
        >>> from lightning_itm.randomness import uniform
        >>> bool((uniform(torch.tensor([5, 7]), 0, 1)[1:] == uniform(torch.tensor([7]), 0, 1)).all())
        True

    References:
        Steele et al., *Fast Splittable Pseudorandom Number Generators*, OOPSLA 2014 (the mixing function of SplitMix64).
    """
    x = ids.long()  # (rows,)
    for value in key:
        x = _mix(x + _signed(_GAMMA * (value + 1)))
    return (_shifted(_mix(x), 40)).float() / (1 << 24)  # 24 bits: as many as float32 holds, so 1 is never reached


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Draw from streams that depend on the key alone, and leave the process's own streams (torch, numpy, random) as they are.

    Args:
        key: Integers, such as seed, epoch and id. Other integers give other streams.

    Example:
        >>> import torch
        >>> from lightning_itm.randomness import seeded
        >>> with seeded(0, 3, 17):
        ...     first = torch.rand(())
        >>> with seeded(0, 3, 17):
        ...     bool(first == torch.rand(()))
        True
    """
    # A hash, since seeds that are close to each other start streams that are alike. `hash()` differs between processes.
    seed = _hash(repr(key).encode())
    # PyTorch's stream of the CPU alone: a worker must not touch CUDA.
    python_state, torch_state = random.getstate(), torch.default_generator.get_state()
    with _another_numpy_stream():
        try:
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # NumPy takes 32 bits
            yield
        finally:
            random.setstate(python_state)
            torch.default_generator.set_state(torch_state)


def random_streams() -> dict[str, Any]:
    """Return the state of PyTorch's streams (CPU and current CUDA device), Python's and NumPy's, for a checkpoint."""
    # Tensors and plain numbers only: a checkpoint is loaded with `weights_only=True`.
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }


def restore_random_streams(state: dict[str, Any]) -> None:
    """Set the streams to a state that :func:`random_streams` returned."""
    version, words, gauss = state["python"]
    name, keys, *rest = state["numpy"]
    torch.set_rng_state(state["torch"].cpu())
    random.setstate((version, tuple(words), gauss))
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


@contextmanager
def random_streams_kept() -> Iterator[None]:
    """Leave all streams as they are, whatever is drawn meanwhile: those that :func:`random_streams` returns."""
    streams = random_streams()
    try:
        yield
    finally:
        restore_random_streams(streams)


def stream_key() -> int:
    """Return a number that depends on where PyTorch's stream stands, without drawing from it."""
    return _hash(torch.get_rng_state().numpy().tobytes()) >> 2  # a plain number that int64 holds


def part_random_streams(rank: int, *key: int) -> None:
    """Let each rank but the first draw other numbers, which depend on ``key`` alone. Rank 0 keeps its streams.

    A checkpoint has the streams of rank 0. The other ranks start theirs anew where it is written, and where it is resumed
    from, by the same key. So both go on alike.

    Args:
        rank: The number of this rank.
        key: Integers, such as a number of the run and the step.
    """
    if rank > 0:
        seed = _hash(repr((rank, *key)).encode())
        torch.manual_seed(seed % 2**63)
        random.seed(seed)
        np.random.seed(seed % 2**32)


@contextmanager
def _another_numpy_stream() -> Iterator[None]:
    """Give NumPy another generator, which is to be seeded, and put its own back. NumPy copies the state of one slowly."""
    has_normal, normal = _kept_normal()  # forgotten where the generator changes
    own, other = np.random.mtrand.get_bit_generator(), _UNUSED.pop() if _UNUSED else np.random.MT19937(0)
    np.random.mtrand.set_bit_generator(other)
    try:
        yield
    finally:
        is_ours = (
            np.random.mtrand.get_bit_generator() is other
        )  # not so where two blocks that overlap end in the wrong order
        np.random.mtrand.set_bit_generator(own)
        if has_normal:  # seldom: after an odd number of them
            np.random.set_state({**own.state, "has_gauss": has_normal, "gauss": normal})
        if is_ours:
            _UNUSED.append(other)


def _kept_normal() -> tuple[int, float]:
    """Return whether NumPy's stream has a normal number left, of the two that it makes at once, and that number."""
    stream: Any = np.random.mtrand._rand
    own = np.random.mtrand.get_bit_generator()
    # `get_state` asks this attribute for the words, too. NumPy's private name: where it is another, all words are copied.
    with suppress(AttributeError):
        stream._bit_generator = SimpleNamespace(state={"bit_generator": "without words"})
    try:
        state: Any = np.random.get_state(legacy=False)
    finally:
        with suppress(AttributeError):
            stream._bit_generator = own
    return state["has_gauss"], state["gauss"]


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _mix(x: Tensor) -> Tensor:
    # int64 stands for uint64, in which not all devices multiply: both wrap around to the same bits.
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
_UNUSED: list[np.random.MT19937] = []  # generators for :func:`seeded`, as many as were nested
