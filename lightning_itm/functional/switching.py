"""A switch that turns on where a level is low, and off where it is high; tensors only, so that no host waits."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Switch(NamedTuple):
    """Whether it is on, and for how many steps it has been so."""

    is_on: Bool[Tensor, ""]
    age: Int[Tensor, ""]


def switched(switch: Switch, level: Float[Tensor, ""], *, low: float, high: float, min_steps: int) -> Switch:
    """Turn on below ``low``, off above ``high``; in between, and for ``min_steps`` after each turn, stay.

    Args:
        switch: As it is.
        level: What decides. One that is not a number changes nothing.
        low: Below it, the switch turns on.
        high: Above it, the switch turns off.
        min_steps: The least number of steps between two turns.

    Returns:
        The switch after one more step.

    Example:
        >>> off = Switch(torch.tensor(False), torch.tensor(9))
        >>> switched(off, torch.tensor(0.1), low=0.5, high=0.8, min_steps=5)
        Switch(is_on=tensor(True), age=tensor(0))
    """
    wants_turn = torch.where(switch.is_on, level > high, level < low)
    turns = wants_turn & (switch.age + 1 >= min_steps)
    return Switch(switch.is_on ^ turns, torch.where(turns, 0, switch.age + 1))
