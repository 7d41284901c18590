"""A switch that follows the gradients of several towers."""

import torch
from torch import Tensor, nn

from lightning_itm.functional.switching import Switch, switched

HEALTHY = (3.0, 30.0)
"""Between which the healthy value of a tower's relative gradient lies; the highest seen so far says where."""


class GradientSwitch(nn.Module):
    """Turn on where a tower's gradient, relative to the loss, falls to a fraction of its healthy value; off above another.

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
        self.register_buffer("size", torch.zeros(num_towers))
        self.register_buffer("loss", torch.zeros(()))
        self.register_buffer("highest", torch.zeros(num_towers))
        self.register_buffer("is_on", torch.tensor(False))
        self.register_buffer("age", torch.tensor(0))
        self.register_buffer("num_skipped", torch.tensor(0))

    def relative(self) -> Tensor:
        """Return κ of each tower, `(towers,)`; both parts of the quotient are averaged, from the same start."""
        return self.size / self.loss.clamp_min(torch.finfo(self.loss.dtype).tiny)

    @torch.no_grad()
    def update(self, size: Tensor, loss: Tensor) -> Tensor:
        """Take in one step, and turn if it is time.

        Args:
            size: `(towers,)`; root mean square, over the weight matrices, of gradient norm times weight norm. 0 for a tower
                that is not trained.
            loss: The loss of the step.

        Returns:
            The level, the lowest of the towers. A step that is not finite is counted in ``num_skipped``, and changes nothing.
        """
        counts = size.isfinite().all() & loss.isfinite()
        self.num_skipped += ~counts
        for average, value in ((self.size, size), (self.loss, loss)):
            average.copy_(torch.where(counts, average * self.smoothing + value * (1 - self.smoothing), average))
        relative = self.relative()
        self.highest.copy_(torch.maximum(self.highest, relative))
        level = torch.where(self.size > 0, relative / self.highest.clamp(*HEALTHY), torch.inf).min()
        before = Switch(self.is_on, self.age)
        after = switched(before, level, low=self.low, high=self.high, min_steps=self.min_steps)
        self.is_on.copy_(torch.where(counts, after.is_on, before.is_on))
        self.age.copy_(torch.where(counts, after.age, before.age))
        return level
