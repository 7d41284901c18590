"""The settings and methods that negatives.py compares."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
from flickr8k import Towers
from icons import IconEncoder, load_icons
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_itm import (
    FalseNegativeElimination,
    FalseNegativeSampler,
    ImageTextDataModule,
    InfoNCELoss,
    OfflineHardNegativeMining,
    SigmoidLoss,
    TripletLoss,
)


@dataclass(frozen=True)
class Method:
    """A loss, and callbacks that bring negatives."""

    loss: Callable[[], nn.Module] = InfoNCELoss
    callbacks: Callable[[int], list[Callback]] = lambda _: []
    rate: float | None = None
    """Another rate than that of InfoNCE, where val chose one."""
    epochs: float = 1.0
    """So many times the epochs of the setting."""


def mining(**options: Any) -> Callable[[int], list[Callback]]:
    """Return what makes a mining callback."""
    defaults: dict[str, Any] = {"texts_per_image": 60, "images_per_text": 60, "num_workers": 0}
    return lambda seed: [OfflineHardNegativeMining(**{**defaults, **options}, seed=seed)]


def bank(queue_size: int, **options: Any) -> Callable[[int], list[Callback]]:
    """Return what makes a memory bank."""
    return lambda seed: [
        FalseNegativeElimination(queue_size, **options, sampler=FalseNegativeSampler(weighting="drop", seed=seed))
    ]


def both(*makers: Callable[[int], list[Callback]]) -> Callable[[int], list[Callback]]:
    """Put callbacks together."""
    return lambda seed: [callback for maker in makers for callback in maker(seed)]


HARD = functools.partial(InfoNCELoss, hardness=9.0)
METHODS: dict[str, Method] = {
    "InfoNCE": Method(),
    "sigmoid": Method(SigmoidLoss),
    "hardest": Method(TripletLoss),
    "selective": Method(functools.partial(TripletLoss, negatives="selective")),
    "hardness 3": Method(functools.partial(InfoNCELoss, hardness=3.0)),
    "hardness 9": Method(HARD),
    "batches of 4": Method(callbacks=mining(inject="batches", group_size=4)),
    "batches of 8": Method(callbacks=mining(inject="batches", group_size=8)),
    "batches of 16": Method(callbacks=mining(inject="batches", group_size=16)),
    "batches of 4, training": Method(callbacks=mining(inject="batches", group_size=4, encode="training")),
    "batches of 16, training": Method(callbacks=mining(inject="batches", group_size=16, encode="training")),
    "batches of 4, hardness 9": Method(HARD, mining(inject="batches", group_size=4)),
    "bank 512": Method(callbacks=bank(512)),
    "bank 4096": Method(callbacks=bank(4096)),
    "bank 4096, hardness 9": Method(HARD, bank(4096)),
    "bank 4096, batches of 4": Method(callbacks=both(bank(4096), mining(inject="batches", group_size=4))),
    "samples": Method(callbacks=mining(relative_margin=0.05)),
    "embeddings": Method(callbacks=mining(inject="embeddings", relative_margin=0.05)),
}


def methods_of(name: str) -> Method:
    """Return a method by its name, or for a longer time: ``"InfoNCE, 1.5 x"``."""
    if name in METHODS:
        return METHODS[name]
    method, _, factor = name.rpartition(", ")
    if method in METHODS and factor.endswith(" x"):
        return replace(METHODS[method], epochs=float(factor[:-2]))
    raise ValueError(
        f"Expected one of {list(METHODS)}, or one of them with a factor such as 'InfoNCE, 1.5 x', got {name!r}."
    )


@dataclass(frozen=True)
class Setting:
    """A set, a model, and how InfoNCE is tuned on it."""

    name: str
    data: Callable[..., ImageTextDataModule]
    model: Callable[[nn.Module, float, Path | None], Any]
    epochs: int
    rate: float
    """Of InfoNCE, chosen on val."""
    rates: tuple[float, ...]
    """Those that were tried."""
    methods: tuple[str, ...]
    start: Callable[[Path | None, int], dict[str, Any] | None] = lambda _folder, _seed: None
    clip: float | None = None
    fraction: float = 1.0
    """Of the pairs that an epoch reads."""


@functools.cache
def _icons(folder: Path | None) -> Any:
    if folder is None:
        raise ValueError("Expected `--folder`, where icons.npz is, got none.")
    return load_icons(folder)


def icon_data(batch_size: int) -> Callable[..., ImageTextDataModule]:
    """Return what makes the icons' data."""

    def make(folder: Path | None, seed: int, **_: Any) -> ImageTextDataModule:
        icons = _icons(folder)
        options: dict[str, Any] = {"batch_size": batch_size, "num_workers": 0, "seed": seed}
        return ImageTextDataModule(icons.train, icons.val, icons.test, **options)

    return make


def icon_model(loss: nn.Module, rate: float, folder: Path | None) -> IconEncoder:
    """Make the small CNN and the bag of words."""
    return IconEncoder(loss, learning_rate=rate, warmup_steps=50, weight_decay=0.01)


@functools.cache
def converged_icons(folder: Path | None, seed: int) -> dict[str, Any]:
    """Train six epochs of InfoNCE, the start of the second setting."""
    L.seed_everything(seed + 1000, verbose=False)
    model = icon_model(InfoNCELoss(), 3e-3, folder)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        max_epochs=6,
        accelerator="cpu",
        gradient_clip_val=2.0,
        limit_val_batches=0,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, datamodule=icon_data(128)(folder, seed + 1000))
    return {name: value for name, value in model.state_dict().items() if not name.startswith("loss.")}


def tower_model(loss: nn.Module, rate: float, folder: Path | None) -> Towers:
    """Make the two towers for photographs and captions."""
    return Towers(loss, rate)


ICON_METHODS = (
    "InfoNCE",
    "hardness 3",
    "hardness 9",
    "batches of 4",
    "batches of 16",
    "batches of 4, training",
    "batches of 4, hardness 9",
    "bank 4096",
)
TOWER_METHODS = (
    "InfoNCE",
    "hardness 3",
    "hardness 9",
    "batches of 4",
    "batches of 8",
    "batches of 4, training",
    "bank 4096",
)
RATES = (1e-3, 3e-3, 6e-3)
SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting("icons", icon_data(128), icon_model, 6, 3e-3, RATES, ICON_METHODS, clip=2.0),
        Setting("icons-512", icon_data(512), icon_model, 6, 6e-3, (3e-3, 6e-3, 1e-2), ICON_METHODS, clip=2.0),
        Setting(
            "icons-converged", icon_data(128), icon_model, 2, 1e-3, (3e-4, 1e-3), ICON_METHODS, converged_icons, 2.0
        ),
    )
}
