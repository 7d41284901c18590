"""A switch that follows the gradients of several towers; tensors only, so that no host waits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

HEALTHY = (3.0, 300.0)
"""Between which the healthy value of a tower's relative gradient lies; the highest seen so far says where."""


class Switch(NamedTuple):
    """Whether it is on, and for how many steps it has been so."""

    is_on: Tensor
    age: Tensor


def switched(switch: Switch, level: Tensor, *, low: float, high: float, min_steps: int) -> Switch:
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


class GradientSwitch(nn.Module):
    """Turn on where a tower's gradient, relative to the loss, falls to a fraction of its healthy value; off above another.

    And off where the loss itself is below half of the margin: such a model has not collapsed.

    See :class:`~lightning_itm.GradientNormMonitor` for the statistic. All state is tensors on the device.

    Args:
        num_towers: How many are watched.
        low: The level below which the switch turns on.
        high: The level above which it turns off.
        smoothing: Share of the old values that an average keeps.
        min_steps: The least number of steps before the first turn, and between two.

    Raises:
        ValueError: An argument out of its range.
    """

    size: Tensor
    loss: Tensor
    weight: Tensor
    highest: Tensor
    is_on: Tensor
    age: Tensor
    num_skipped: Tensor

    def __init__(self, num_towers: int, *, low: float, high: float, smoothing: float, min_steps: int) -> None:
        super().__init__()
        if not 0 < low < high <= 1:
            raise ValueError(f"Expected 0 < `low` < `high` <= 1, got low={low} and high={high}.")
        if not 0 <= smoothing < 1:
            raise ValueError(f"Expected `smoothing` to be in [0, 1), got {smoothing}.")
        if min_steps < 1:
            raise ValueError(f"Expected `min_steps` to be at least 1, got {min_steps}.")
        self.low, self.high, self.smoothing, self.min_steps = low, high, smoothing, min_steps
        for name in ("size", "loss", "weight", "highest"):  # averages; that of one is their bias
            self.register_buffer(name, torch.zeros(num_towers))
        self.register_buffer("is_on", torch.tensor(False))
        self.register_buffer("age", torch.tensor(0))
        self.register_buffer("num_skipped", torch.tensor(0))

    def relative(self) -> Tensor:
        """Return κ of each tower, `(towers,)`; both parts of the quotient are averaged, over the same steps."""
        return self.size / self.loss.clamp_min(torch.finfo(self.loss.dtype).tiny)

    @torch.no_grad()
    def update(self, size: Tensor, loss: Tensor, margin: float) -> Tensor:
        """Take in one step, and turn if it is time.

        Args:
            size: `(towers,)`; gradient norm times weight norm of the matrix where it is largest. −1 for a tower that is not
                trained in this step, which changes nothing of what is known of it.
            loss: The loss of the step.
            margin: Of the hinge, in the units of the loss.

        Returns:
            The level, the lowest of the towers that are trained. A step that is not finite is counted in ``num_skipped``, and
            changes nothing; nor does one without any loss.
        """
        is_finite = size.isfinite().all() & loss.isfinite()
        self.num_skipped += ~is_finite
        counts = is_finite & (loss > 0)
        is_trained = size >= 0
        for average, value in ((self.size, size), (self.loss, loss), (self.weight, 1.0)):
            new = average * self.smoothing + value * (1 - self.smoothing)
            average.copy_(torch.where(counts & is_trained, new, average))
        relative = self.relative()
        self.highest.copy_(torch.maximum(self.highest, relative))
        level = torch.where(is_trained, relative / self.highest.clamp(*HEALTHY), torch.inf).min()
        has_converged = torch.where(is_trained, self.loss / self.weight, 0).max() < margin / 2
        before = Switch(self.is_on, self.age)
        decisive = torch.where(has_converged, torch.inf, level)
        after = switched(before, decisive, low=self.low, high=self.high, min_steps=self.min_steps)
        self.is_on.copy_(torch.where(counts, after.is_on, before.is_on))
        self.age.copy_(torch.where(counts, after.age, before.age))
        return level


def measure_gradient(parameters: list[nn.Parameter], device: torch.device | None = None) -> Tensor:
    """Return a tower's gradient norm, and the largest of its matrices' gradient norm times weight norm; −1 without any."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    if not trained:
        return torch.full((2,), -1.0, device=device)
    # Without any matrix, as where biases alone are trained, all of them.
    matrices = [parameter for parameter in trained if parameter.ndim >= 2] or trained
    others = [parameter for parameter in trained if parameter.ndim < 2] if matrices is not trained else []
    of_matrices = _norms([one.grad for one in matrices])
    size, norm = (of_matrices * _norms(matrices)).max(), of_matrices.norm()
    if others:
        norm = torch.hypot(norm, _norms([one.grad for one in others]).norm())
    return torch.stack([norm, size])


def _norms(tensors: list[Any]) -> Tensor:
    is_half = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors)
    dtype = torch.float32 if is_half else None  # squares of half precision overflow
    return torch.stack(torch._foreach_norm([tensor.detach() for tensor in tensors], 2, dtype)).float()
