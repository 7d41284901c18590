"""Gradient norms and loss over the steps, as one figure."""

from typing import Any


def plot_gradients(curves: dict[str, list[float]], *, low: float, high: float) -> Any:
    """Draw loss, norms and level, one below the other, the spans where the rule was on shaded.

    Args:
        curves: Of :meth:`~lightning_itm.GradientNormMonitor.curves`.
        low: The level below which the rule goes on.
        high: The level above which it goes off.

    Returns:
        A matplotlib figure.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 1, figsize=(9, 8), sharex=True, layout="constrained")
    steps = curves["step"]
    axes[0].plot(steps, curves["loss"], color="black", linewidth=1)
    axes[0].set(ylabel="training loss", ylim=(0, None), title="Where gradients vanish, selective hard negatives go on")
    for name in (name for name in curves if name.endswith("_norm")):
        axes[1].plot(steps, curves[name], linewidth=1, label=name.removesuffix("_norm"))
    axes[1].set(ylabel="gradient norm", yscale="log")
    axes[1].legend(frameon=False, loc="upper right")
    axes[2].plot(steps, curves["level"], color="tab:green", linewidth=1)
    for value, name in ((low, "on below"), (high, "off above")):
        axes[2].axhline(value, color="gray", linestyle=":", linewidth=1)
        axes[2].annotate(
            name, (1, value), (-2, 2), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right"
        )
    axes[2].set(xlabel="optimizer step", ylabel="level: relative gradient\nof its healthy value", yscale="log")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        for start, end in spans(steps, curves["selective"]):
            ax.axvspan(start, end, color="tab:blue", alpha=0.15, linewidth=0)
    return figure


def spans(steps: list[float], is_on: list[float]) -> list[tuple[float, float]]:
    """Return where the switch was on, from its first step to the first one after.

    Example:
        >>> spans([1, 2, 3, 4, 5], [0, 1, 1, 0, 1])
        [(2, 4), (5, 5)]
    """
    found: list[tuple[float, float]] = []
    start: float | None = None
    for step, value in zip(steps, is_on, strict=True):
        if value and start is None:
            start = step
        elif not value and start is not None:
            found.append((start, step))
            start = None
    return found if start is None else [*found, (start, steps[-1])]
