"""A switch that follows the gradients of several towers. Its state is tensors only, so that no host waits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

HEALTHY = (3.0, 300.0)
"""The bounds of the healthy value of a tower's relative gradient. Between them, it is the highest value so far."""


class Switch(NamedTuple):
    """Whether it is on, and for how many steps it has been so."""

    is_on: Tensor
    age: Tensor


def switched(switch: Switch, level: Tensor, *, low: float, high: float, min_steps: int) -> Switch:
    """Turn on below ``low`` and off above ``high``. In between, and for ``min_steps`` after each turn, stay.

    Args:
        switch: The switch before this step.
        level: The value that decides, a scalar tensor. NaN changes nothing.
        low: The level below which the switch turns on.
        high: The level above which the switch turns off.
        min_steps: The smallest number of steps between two turns.

    Returns:
        The switch after one more step.

    Example:
        >>> import torch
        >>> from lightning_itm.gradient_monitor import Switch, switched
        >>> off = Switch(torch.tensor(False), torch.tensor(9))
        >>> switched(off, torch.tensor(0.1), low=0.5, high=0.8, min_steps=5)
        Switch(is_on=tensor(True), age=tensor(0))
    """
    wants_turn = torch.where(switch.is_on, level > high, level < low)
    turns = wants_turn & (switch.age + 1 >= min_steps)
    return Switch(switch.is_on ^ turns, torch.where(turns, 0, switch.age + 1))


class GradientSwitch(nn.Module):
    """Turn on when the relative gradient of a tower falls to a fraction of its healthy value, and off when it recovers.

    It is also off while the loss is below half of the margin, because such a model has not collapsed.
    :class:`~lightning_itm.GradientNormMonitor` explains the statistic. All state is tensors on the device.

    Args:
        num_towers: The number of towers that are watched, two in a dual encoder.
        low: The level below which the switch turns on, such as 0.5.
        high: The level above which it turns off, such as 0.8. It must be larger than ``low`` and at most 1.
        smoothing: The fraction of its old value that each average keeps at a step, such as 0.9.
        min_steps: The smallest number of steps before the first turn, and between two turns, such as 5.

    Raises:
        ValueError: If an argument is out of its range.
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
        # Exponential averages, and the highest κ so far. `size` is the average of the sensitivity (the key of older
        # checkpoints stays), and `weight` is the average of the number one, by which the averages are too small at the start.
        for name in ("size", "loss", "weight", "highest"):
            self.register_buffer(name, torch.zeros(num_towers))
        self.register_buffer("is_on", torch.tensor(False))
        self.register_buffer("age", torch.tensor(0))
        self.register_buffer("num_skipped", torch.tensor(0))

    def relative(self) -> Tensor:
        """Return κ of each tower, `(towers,)`. Both parts of the quotient are averages over the same steps."""
        return self.size / self.loss.clamp_min(torch.finfo(self.loss.dtype).tiny)

    @torch.no_grad()
    def update(self, sensitivity: Tensor, loss: Tensor, margin: float) -> Tensor:
        """Take in one step, and turn if it is time.

        Args:
            sensitivity: `(towers,)`: gradient norm times weight norm of the matrix where this product is largest. It is −1
                for a tower that is not trained in this step, whose averages stay.
            loss: The loss of the step, a scalar tensor.
            margin: The margin of the hinge, in the units of the loss.

        Returns:
            The level, which is the lowest of the trained towers. A step that is not finite is counted in ``num_skipped`` and
            changes nothing else. A step whose loss is 0 changes nothing.
        """
        is_finite = sensitivity.isfinite().all() & loss.isfinite()
        self.num_skipped += ~is_finite
        counts = is_finite & (loss > 0)
        is_trained = sensitivity >= 0
        for average, value in ((self.size, sensitivity), (self.loss, loss), (self.weight, 1.0)):
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
    """Return a tower's gradient norm, and its sensitivity; −1 for both without any gradient."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    if not trained:
        return torch.full((2,), -1.0, device=device)
    # A tower may train biases alone. Without any matrix, all its parameters are compared.
    matrices = [parameter for parameter in trained if parameter.ndim >= 2] or trained
    others = [parameter for parameter in trained if parameter.ndim < 2] if matrices is not trained else []
    of_matrices = _norms([one.grad for one in matrices])
    sensitivity, norm = (of_matrices * _norms(matrices)).max(), of_matrices.norm()
    if others:
        norm = torch.hypot(norm, _norms([one.grad for one in others]).norm())
    return torch.stack([norm, sensitivity])


def _norms(tensors: list[Any]) -> Tensor:
    is_half = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors)
    dtype = torch.float32 if is_half else None  # squares of half precision overflow
    return torch.stack(torch._foreach_norm([tensor.detach() for tensor in tensors], 2, dtype)).float()
