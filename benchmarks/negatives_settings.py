"""The settings that negatives.py compares methods in: a set, a model, and how plain InfoNCE was tuned there."""

import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
from icons import IconEncoder, load_icons
from negatives_knobs import (
    EMOJI,
    EMOJI_RATES,
    EMOJI_SEARCH,
    EMOJI_START,
    EMOJI_TOWER_METHODS,
    EMOJI_TOWER_SEARCH,
    EMOJI_TOWERS,
    FURTHER_SEARCH,
    GRID,
    GRID_EPOCHS,
    GRID_FRACTION,
    GRID_KNOBS,
    GRID_METHODS,
    GRID_SEARCH,
    GRID_START_METHODS,
    HEAD_METHODS,
    HEAD_SEARCH,
    HEADS,
    ICON_METHODS,
    ICON_SEARCH,
    ICONS,
    LARGE_ICON_METHODS,
    LARGE_ICON_SEARCH,
    LARGE_ICONS,
    SMALL_HEAD_METHODS,
    SMALL_METHODS,
    TOWER_METHODS,
    TOWER_SEARCH,
    TOWERS,
)
from torch import nn

from lightning_itm import ImageTextDataModule, InfoNCELoss

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from emoji_data import small_pictures
from train_on_emoji import Small, files

State = dict[str, Any]
Data = Callable[[Path | None, int], ImageTextDataModule]


@dataclass(frozen=True)
class Setting:
    """A set, a model, and how InfoNCE is tuned on it."""

    name: str
    data: Data
    model: Callable[..., Any]
    """Called with the loss, the folder, and all knobs but two, ``epochs`` and ``temperature``."""
    knobs: dict[str, Any]
    """Of InfoNCE, chosen on val."""
    search: dict[str, tuple[Any, ...]]
    """The values that were tried, one knob at a time, with the others as in ``knobs``."""
    methods: tuple[str, ...]
    own: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Knobs of other methods, where val chose others."""
    start: Callable[[Path | None, int], State | None] = lambda _folder, _seed: None
    clip: float | None = None
    fraction: float = 1.0
    """Of the pairs that an epoch reads."""

    def knobs_of(self, method: str) -> dict[str, Any]:
        """Return the knobs of a method: InfoNCE's, and its own."""
        return {"temperature": None, **self.knobs, **self.own.get(method, {})}


@functools.cache
def _icons(folder: Path | None) -> Any:
    if folder is None:
        raise ValueError("Expected `--folder`, where icons.npz is, got none. icons_make.py makes it.")
    return load_icons(folder)


def icon_data(batch_size: int) -> Data:
    """Return what makes the icons' data."""

    def make(folder: Path | None, seed: int) -> ImageTextDataModule:
        icons = _icons(folder)
        return ImageTextDataModule(icons.train, icons.val, icons.test, batch_size=batch_size, num_workers=0, seed=seed)

    return make


def icon_model(loss: nn.Module, folder: Path | None, **knobs: Any) -> IconEncoder:
    """Make the small CNN and the bag of words."""
    return IconEncoder(loss, warmup_steps=50, **knobs)


def emoji_data(batch_size: int) -> Data:
    """Return what makes the data of the example."""

    def make(_: Path | None, seed: int) -> ImageTextDataModule:
        return ImageTextDataModule(*_emoji(), batch_size=batch_size, num_workers=0, seed=seed)

    return make


@functools.cache
def _emoji() -> Any:
    return small_pictures()


def emoji_model(loss: nn.Module, folder: Path | None, *, learning_rate: float, weight_decay: float) -> Small:
    """Make the small model of the example."""
    model = Small(loss, learning_rate)
    model.weight_decay = weight_decay
    return model


@functools.cache
def _emoji_files() -> Any:
    return files()


def emoji_tower_data(_: Path | None, seed: int) -> ImageTextDataModule:
    """Return the emoji as pretrained towers take them."""
    return ImageTextDataModule(*_emoji_files(), batch_size=64, num_workers=0, seed=seed)


def emoji_tower_model(loss: nn.Module, folder: Path | None, **knobs: Any) -> Any:
    """Make the pretrained towers, for pictures of 72 pixels."""
    return later("pretrained_towers", "Towers")(loss, 72, **knobs)


def converged(
    data: Data, model: Callable[..., Any], epochs: int, clip: float | None = None, fraction: float = 1.0, **knobs: Any
) -> Callable[[Path | None, int], State]:
    """Return what trains a model with InfoNCE, once for each seed, and gives its weights for a start."""

    @functools.cache
    def start(folder: Path | None, seed: int) -> State:
        L.seed_everything(seed + 1000, verbose=False)
        module = model(InfoNCELoss(), folder, **knobs)
        silent: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        options = {**silent, "limit_val_batches": 0, "enable_model_summary": False, "accelerator": "cpu"}
        options["limit_train_batches"] = fraction
        trainer = L.Trainer(max_epochs=epochs, gradient_clip_val=clip, **options)
        trainer.fit(module, datamodule=data(folder, seed + 1000))
        return module.state_dict()  # type: ignore[no-any-return]

    return start


def later(module: str, name: str, *first: Any) -> Callable[..., Any]:
    """Return a function that is imported when it is called: photographs need the pretrained towers, icons do not.

    With ``first``, the function is called with it, and what that returns with all the rest.
    """

    def call(*args: Any, **options: Any) -> Any:
        function = getattr(importlib.import_module(module), name)
        return (function(*first) if first else function)(*args, **options)

    return call


def tower_model(loss: nn.Module, folder: Path | None, **knobs: Any) -> Any:
    """Make the two towers for photographs and captions."""
    return later("flickr8k", "Towers")(loss, **knobs)


tower_data = later("flickr8k", "tower_data")
grid_data, grid_model, head_model, trained_heads = (
    later("flickr8k_features", name) for name in ("grid_data", "grid_model", "head_model", "trained_heads")
)
_grid_start = converged(grid_data, grid_model, GRID_EPOCHS, 2.0, GRID_FRACTION, **GRID_KNOBS)
SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting("emoji", emoji_data(64), emoji_model, {**EMOJI_START, "epochs": 18}, EMOJI_SEARCH, SMALL_METHODS),
        *(
            Setting(
                f"emoji-{batch_size}",
                emoji_data(batch_size),
                emoji_model,
                EMOJI,
                FURTHER_SEARCH,
                SMALL_METHODS,
                {method: {"learning_rate": rate} for method, rate in EMOJI_RATES[batch_size].items()},
                converged(emoji_data(64), emoji_model, 18, **EMOJI_START),
            )
            for batch_size in (32, 128)
        ),
        Setting(
            "emoji-towers",
            emoji_tower_data,
            emoji_tower_model,
            EMOJI_TOWERS,
            EMOJI_TOWER_SEARCH,
            EMOJI_TOWER_METHODS,
            start=converged(emoji_tower_data, emoji_tower_model, 4, learning_rate=3e-4, weight_decay=0.05),
        ),
        Setting("flickr8k", tower_data, tower_model, TOWERS, TOWER_SEARCH, TOWER_METHODS, {}, trained_heads, None, 0.2),
        Setting("icons", icon_data(128), icon_model, ICONS, ICON_SEARCH, ICON_METHODS, clip=2.0),
        Setting("icons-512", icon_data(512), icon_model, LARGE_ICONS, LARGE_ICON_SEARCH, LARGE_ICON_METHODS, clip=2.0),
        Setting(
            "icons-converged",
            icon_data(128),
            icon_model,
            {**ICONS, "learning_rate": 1e-3, "epochs": 2},
            FURTHER_SEARCH,
            ICON_METHODS,
            start=converged(icon_data(128), icon_model, 6, 2.0, learning_rate=3e-3, weight_decay=0.01),
            clip=2.0,
        ),
        *(
            Setting(
                f"heads-{size}",
                later("flickr8k_features", "head_data", size),
                head_model,
                HEADS,
                HEAD_SEARCH,
                methods,
                fraction=fraction,
            )
            for size, methods, fraction in ((16, SMALL_HEAD_METHODS, 0.25), (128, HEAD_METHODS, 1.0))
        ),
        Setting("grid", grid_data, grid_model, GRID, GRID_SEARCH, GRID_METHODS, clip=2.0, fraction=GRID_FRACTION),
        Setting(
            "grid-converged",
            grid_data,
            grid_model,
            {**GRID, "learning_rate": 1e-4, "epochs": 2},
            FURTHER_SEARCH,
            GRID_START_METHODS,
            start=lambda folder, _seed: _grid_start(folder, 0),
            clip=2.0,
            fraction=GRID_FRACTION,
        ),
    )
}
