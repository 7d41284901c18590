"""Gradient norms and loss over the steps, as one figure."""

from typing import Any


def plot_gradients(curves: dict[str, list[float]], *, low: float, high: float) -> Any:
    """Draw loss, norms and level, one below the other. The spans where the rule was on are shaded.

    Args:
        curves: One list per curve, as :meth:`~lightning_itm.GradientNormMonitor.curves` returns them.
        low: The level below which the rule goes on, drawn as a line.
        high: The level above which the rule goes off, drawn as a line.

    Returns:
        A matplotlib figure.
    """
    # Here, because training alone does not need matplotlib. A plain figure has no window, so nothing has to be closed.
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(9, 8), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    steps = curves["step"]
    axes[0].plot(steps, curves["loss"], color="black", linewidth=1)
    axes[0].set(ylabel="training loss", ylim=(0, None), title="Where gradients vanish, selective hard negatives go on")
    # A logarithmic axis: a collapse takes the norms down by powers of ten.
    for name in (name for name in curves if name.endswith("_norm")):
        axes[1].plot(steps, curves[name], linewidth=1, label=name.removesuffix("_norm"))
    axes[1].set(ylabel="gradient norm", yscale="log")
    axes[2].plot(steps, curves["level"], color="tab:green", linewidth=1)
    for value, name, side in ((low, "on below", "top"), (high, "off above", "bottom")):
        axes[2].axhline(value, color="gray", linestyle=":", linewidth=1)
        axes[2].annotate(  # beside the axes, where no curve is
            f"{name} {value:g}",
            (1, value),
            (4, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va=side,
        )
    axes[2].set(xlabel="optimizer step", ylabel="level: relative gradient\nby its healthy value", yscale="log")
    axes[2].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # it often moves within a power of ten
    for ax in axes[1:]:
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        for number, (start, end) in enumerate(spans(steps, curves["selective"])):
            # The span ends where the first step without the rule begins.
            label = "selective negatives on" if ax is axes[0] and number == 0 else None  # once in all legends
            ax.axvspan(start, end, color="tab:blue", alpha=0.15, linewidth=0, label=label)
    if any(curves["selective"]):
        axes[0].legend(frameon=False, loc="upper right")
    axes[1].legend(frameon=False, loc="upper right", ncols=2)
    return figure


def spans(steps: list[float], is_on: list[float]) -> list[tuple[float, float]]:
    """Find the spans in which the switch was on.

    Args:
        steps: The numbers of the steps, in order.
        is_on: Whether the switch was on in each of them, 1 or 0.

    Returns:
        A pair per span: the first step with the switch on, and the first one with the switch off again. A span that is still
        open ends with the last step.

    Example:
        >>> from lightning_itm.gradient_monitor import spans
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
