"""A switch that follows the gradients of several towers. Its state is tensors only, so that no host waits."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_itm.sharded_weights import is_part, whole_norms

HEALTHY = (3.0, 300.0)
"""The bounds of the healthy value of a tower's relative gradient κ. Between them, the value is learnt from healthy steps."""
MEMORY = 100
"""The number of healthy steps that the reference remembers. It is a mean at first, and an exponential average later."""
LARGEST_MOVE = math.log(2)
"""The largest difference between the log κ of a step and the reference that counts, so that a spike moves it by 0.7 %."""
AT_MARGIN = 0.8
"""The fraction of the margin above which a small κ is a collapse, where the loss is the margin or more."""


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
    """Turn on when the relative gradient κ of a tower falls below its healthy value, and off when it recovers.

    The level is κ over its healthy value. This is a reference that follows log κ slowly, while the model is healthy and the
    switch is off. There is an absolute test, too: a κ below 3 with a loss of at least 0.8 of the margin is a collapse,
    whatever the reference says. The switch is off while the loss is below half of the margin, because such a model has not
    collapsed.
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
    reference: Tensor
    num_healthy: Tensor
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
        # Exponential averages, (towers,). `size` is that of the sensitivity (older checkpoints have this key), and `weight` is
        # that of the number one: all of them start at 0, so they are too small by this factor.
        for name in ("size", "loss", "weight"):
            self.register_buffer(name, torch.zeros(num_towers))
        # It starts at the lower bound and climbs, so that a spike in the first step cannot set it.
        self.register_buffer("reference", torch.full((num_towers,), math.log(HEALTHY[0])))
        self.register_buffer("num_healthy", torch.zeros(num_towers, dtype=torch.long))
        self.register_buffer("is_on", torch.tensor(False))
        self.register_buffer("age", torch.tensor(0))
        self.register_buffer("num_skipped", torch.tensor(0))

    def relative(self) -> Tensor:
        """Return κ of each tower, `(towers,)`. Both parts of the quotient are averages over the same steps."""
        return _quotient(self.size, self.loss)

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
        lowest = torch.where(is_trained, relative, torch.inf).min()
        level = torch.where(is_trained, relative / self.reference.exp(), torch.inf).min()
        mean_loss = torch.where(is_trained, self.loss / self.weight, 0).max()
        has_converged = mean_loss < margin / 2
        has_collapsed = (lowest < HEALTHY[0]) & (mean_loss >= AT_MARGIN * margin)
        # κ of a converged model is many times larger, so its steps would set a reference that no step before could reach.
        is_healthy = ~self.is_on & ~has_converged & ~has_collapsed & (level >= self.low)
        self._follow(_quotient(sensitivity, loss), counts & is_trained & is_healthy)

        decisive = torch.where(has_converged, torch.inf, torch.where(has_collapsed, 0, level))
        before = Switch(self.is_on, self.age)
        after = switched(before, decisive, low=self.low, high=self.high, min_steps=self.min_steps)
        self.is_on.copy_(torch.where(counts, after.is_on, before.is_on))
        self.age.copy_(torch.where(counts, after.age, before.age))
        return level

    def _follow(self, relative: Tensor, is_healthy: Tensor) -> None:
        """Move the reference of each healthy tower towards log κ of this step alone, in which a spike is one step long."""
        self.num_healthy += is_healthy
        move = (relative.log() - self.reference).clamp(-LARGEST_MOVE, LARGEST_MOVE)
        new = self.reference + move / self.num_healthy.clamp(1, MEMORY)
        new = new.clamp(*(math.log(bound) for bound in HEALTHY))
        # `where`, not a product with the mask: log κ of a skipped step may be NaN.
        self.reference.copy_(torch.where(is_healthy, new, self.reference))


def upgrade_switch_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state of the first version, whose healthy value was the highest κ so far.

    Args:
        state: The state of a switch, of the first version or of this one, which comes back as it is.

    Returns:
        A state that :class:`GradientSwitch` can load. The reference is the log of the highest κ, and counts as learnt.
    """
    new = dict(state)
    if "highest" in new:
        highest = new.pop("highest").clamp(*HEALTHY)
        new["reference"] = highest.log()
        new["num_healthy"] = torch.full_like(highest, MEMORY, dtype=torch.long)
    return new


def _quotient(sensitivity: Tensor, loss: Tensor) -> Tensor:
    return sensitivity / loss.clamp_min(torch.finfo(loss.dtype).tiny)


def measure_gradient(parameters: list[nn.Parameter], device: torch.device | None = None) -> Tensor:
    """Measure how large the gradient of a tower is, alone and relative to its weights.

    Args:
        parameters: The parameters of the tower, after the backward pass. Those without a gradient are left out. Where FSDP2
            splits them over the ranks, the norms are of the whole tensors, and every rank must call this function.
        device: The device of the result, where no parameter has a gradient. Default: the CPU.

    Returns:
        Two numbers, `(2,)`: the norm of the gradient, and the sensitivity, which is the gradient norm times the weight norm of
        the matrix where this product is largest. Both are −1 where no parameter has a gradient.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    if not trained:
        return torch.full((2,), -1.0, device=device)
    # Biases often start at zero, where the product says nothing. But a tower may train biases alone: then they count.
    matrices = [parameter for parameter in trained if parameter.ndim >= 2] or trained
    others = [parameter for parameter in trained if parameter.ndim < 2] if matrices is not trained else []
    # All at once: where weights are split over the ranks, the ranks meet for each call.
    norms = _norms([*(one.grad for one in matrices), *matrices, *(one.grad for one in others)])
    of_matrices, of_weights, of_others = norms.split([len(matrices), len(matrices), len(others)])
    sensitivity, norm = (of_matrices * of_weights).max(), of_matrices.norm()
    if others:
        norm = torch.hypot(norm, of_others.norm())
    return torch.stack([norm, sensitivity]).to(device)


def _norms(tensors: list[Any]) -> Tensor:
    is_half = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors)
    dtype = torch.float32 if is_half else None  # squares of half precision overflow
    own = [tensor.to_local() if is_part(tensor) else tensor for tensor in (one.detach() for one in tensors)]
    return torch.stack(whole_norms(torch._foreach_norm(own, 2, dtype), tensors)).float()


def restored_switch(state: dict[str, Any], towers: list[str], version: int) -> dict[str, Any]:
    """Return the state of the switch in the checkpoint of a monitor, as this release has it.

    Args:
        state: What ``GradientNormMonitor.state_dict`` returned.
        towers: The names of the towers of this run.
        version: The version of the state that this release writes. Version 1 kept the highest κ instead of a reference.

    Raises:
        ValueError: if it is of a newer version, or of other towers.
    """
    if state.get("version", 1) > version:
        raise ValueError(
            f"Expected the state of `GradientNormMonitor` to be of version {version} or older, got {state['version']}. "
            "Resume with the release of `lightning_itm` that wrote the checkpoint."
        )
    if state["towers"] != towers:
        raise ValueError(
            f"Expected the checkpoint to have the towers {towers}, got {state['towers']}. Resume with the same module."
        )
    return upgrade_switch_state(state["switch"])
