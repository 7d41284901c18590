"""Uniform numbers that are functions of what they are for."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]  # its integers are beyond what the compiler takes
def uniform(ids: Int[Tensor, " rows"], *key: int) -> Float[Tensor, " rows"]:
    """Draw a number in [0, 1) for each id: the same on any device, in any batch and after a resume.

    Args:
        ids: What the numbers are for.
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
