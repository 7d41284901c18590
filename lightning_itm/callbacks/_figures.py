"""Send a figure to the loggers of a run, each in the way that it takes pictures."""

import functools
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from lightning_itm.randomness import random_streams_kept

Pixels = np.ndarray[Any, np.dtype[np.uint8]]  # (height, width, 3)


def log_figure(trainer: L.Trainer, name: str, draw: Callable[[], Any]) -> None:
    """Draw a figure and send it to all loggers that take pictures. Without such a logger, nothing is drawn.

    TensorBoard, W&B, MLflow and Comet take pictures, as PNG. A :class:`~lightning.pytorch.loggers.CSVLogger` does not. It
    happens in the first process only. No random number of the run is used, and no window and no backend of matplotlib.

    Args:
        trainer: The Trainer, whose loggers and step are used.
        name: What the picture is called, such as ``"mining/contact_sheet"``.
        draw: A function that returns a matplotlib figure.
    """
    takers = [logger for logger in trainer.loggers if isinstance(logger, tuple(_SEND))]
    if not (trainer.is_global_zero and takers and _has_matplotlib()):
        return
    with random_streams_kept():  # loggers draw names for the files that they send
        pixels = _pixels_of(draw())
        for logger in takers:
            send = next(send for kind, send in _SEND.items() if isinstance(logger, kind))
            send(logger, name, pixels, trainer.global_step)


@functools.cache  # so it is said once, and not after each epoch
def _has_matplotlib() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        rank_zero_info(
            'No figures are logged, because matplotlib is not installed: `pip install "lightning_itm[plot]"`. With '
            "`log_figures=False` nobody asks for them."
        )
        return False
    return True


def _pixels_of(figure: Any) -> Pixels:
    """Render a figure. The canvas is for this figure alone: `pyplot` would ask for the user's backend, or for a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)  # its methods have no types
    canvas.draw()
    pixels: Pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()  # without transparency, (height, width, 3)
    figure.clear()  # its artists hold each other, and the pictures in it, until the garbage collector comes
    return pixels


def _to_tensorboard(logger: Any, name: str, pixels: Pixels, step: int) -> None:
    logger.experiment.add_image(name, pixels, step, dataformats="HWC")


def _to_wandb(logger: Any, name: str, pixels: Pixels, step: int) -> None:
    logger.log_image(name, [pixels], step)


def _to_mlflow(logger: Any, name: str, pixels: Pixels, step: int) -> None:
    # An artifact has no step, so its name has it.
    logger.experiment.log_image(logger.run_id, pixels, f"{name}/step_{step:08d}.png")


def _to_comet(logger: Any, name: str, pixels: Pixels, step: int) -> None:
    logger.experiment.log_image(pixels, name=name, step=step)


_SEND: dict[type[Logger], Callable[[Any, str, Pixels, int], None]] = {
    TensorBoardLogger: _to_tensorboard,
    WandbLogger: _to_wandb,
    MLFlowLogger: _to_mlflow,
    CometLogger: _to_comet,
}
