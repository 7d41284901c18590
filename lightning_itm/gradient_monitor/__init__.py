"""When the rule for negatives changes: a switch that follows the gradients, and its figure."""

from lightning_itm.gradient_monitor.figure import plot_gradients, spans
from lightning_itm.gradient_monitor.switch import GradientSwitch, Switch, measure_gradient, switched

__all__ = ["GradientSwitch", "Switch", "measure_gradient", "plot_gradients", "spans", "switched"]
