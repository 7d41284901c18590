"""To what InfoNCE was tuned in each setting of negatives.py, what was tried, and which methods are compared there."""

from typing import Any

TOWER_METHODS = ("InfoNCE", "hardness 3", "batches of 4, mined once", "bank")
EMOJI_TOWER_METHODS = ("InfoNCE", "hardness 9", "batches of 4", "bank", "InfoNCE, 1.5 x", "InfoNCE, 2 x")
HEAD_METHODS = ("InfoNCE", "hardness 3", "batches of 4", "bank", "InfoNCE, 1.5 x")
SMALL_HEAD_METHODS = (
    "InfoNCE",
    "hardness 3",
    "batches of 4, every 4th epoch",
    "bank",
    "InfoNCE, 1.5 x",
    "InfoNCE, 3 x",
)
ICON_METHODS = ("InfoNCE", "hardness 9", "batches of 4", "bank", "InfoNCE, 1.5 x", "InfoNCE, 2 x")
LARGE_ICON_METHODS = ("InfoNCE", "hardness 9", "batches of 4", "bank", "InfoNCE, 1.5 x")
MINED = ("batches of 4", "batches of 4, training", "samples", "embeddings")
BANKS = ("bank", "bank 8192", "bank 512", "bank, batches of 4")
SMALL_METHODS = ("InfoNCE", "InfoNCE, 2 x", "InfoNCE, 3 x", "hardness 3", "hardness 9", *MINED, *BANKS, "sigmoid")
GRID_METHODS = ("InfoNCE", "hardest", "selective", "selective, FNE")
GRID_START_METHODS = (*GRID_METHODS, "AOQ", "batches of 4", "hardness 9")

ICONS = {"learning_rate": 1e-2, "weight_decay": 0.3, "epochs": 6}
ICON_SEARCH: dict[str, tuple[Any, ...]] = {
    "learning_rate": (1e-3, 3e-3, 6e-3, 1e-2, 2e-2, 4e-2),
    "temperature": (0.03, None, 0.15),
    "weight_decay": (0.01, 0.1, 0.3, 1.0),
}
LARGE_ICONS = {**ICONS, "learning_rate": 8e-2}
LARGE_ICON_SEARCH: dict[str, tuple[Any, ...]] = {
    "learning_rate": (1e-2, 2e-2, 3e-2, 4e-2, 8e-2, 1.6e-1),
    "weight_decay": (0.1, 0.3, 1.0),
}
FURTHER_SEARCH: dict[str, tuple[Any, ...]] = {"learning_rate": (3e-5, 1e-4, 3e-4, 1e-3), "temperature": (None, 0.07)}
EMOJI = {"learning_rate": 1e-4, "weight_decay": 0.1, "epochs": 4}
EMOJI_RATES = {  # of other methods, where the validation set chose others than for InfoNCE, by the size of the batches
    32: {
        **dict.fromkeys(("hardness 3", "batches of 4", "batches of 4, training", "samples"), 3e-4),
        **dict.fromkeys(("bank", "bank 512", "bank 8192", "bank, batches of 4", "sigmoid"), 1e-3),
    },
    128: {
        "batches of 4": 3e-4,
        **dict.fromkeys(("bank", "bank 512", "bank 8192", "hardness 3", "batches of 4, training", "sigmoid"), 1e-3),
    },
}
EMOJI_START: dict[str, Any] = {"learning_rate": 3e-3, "weight_decay": 0.1}
EMOJI_SEARCH: dict[str, tuple[Any, ...]] = {
    "learning_rate": (1e-3, 3e-3, 1e-2),
    "weight_decay": (0.1, 0.3, 1.0, 3.0),
    "epochs": (12, 18, 36),
}
EMOJI_TOWERS = {"learning_rate": 1e-4, "weight_decay": 0.05, "epochs": 2}
EMOJI_TOWER_SEARCH: dict[str, tuple[Any, ...]] = {"learning_rate": (3e-5, 1e-4, 3e-4, 1e-3)}
TOWERS = {"learning_rate": 4e-4, "weight_decay": 0.05, "epochs": 3}
TOWER_SEARCH: dict[str, tuple[Any, ...]] = {"learning_rate": (1e-4, 2e-4, 4e-4, 8e-4), "temperature": (None, 0.07)}
HEADS = {"learning_rate": 1e-3, "weight_decay": 0.05, "dropout": 0.5, "hidden": 0, "temperature": 0.03, "epochs": 16}
HEAD_SEARCH: dict[str, tuple[Any, ...]] = {
    "learning_rate": (3e-4, 1e-3, 3e-3, 1e-2),
    "dropout": (0.0, 0.2, 0.5, 0.7),
    "hidden": (0, 512),
    "epochs": (4, 8, 16),
    "temperature": (0.015, 0.03, None),
    "weight_decay": (0.05, 0.5),
}
GRID_KNOBS: dict[str, Any] = {"learning_rate": 2e-3, "weight_decay": 0.1}
GRID_EPOCHS = 8
GRID = {**GRID_KNOBS, "epochs": GRID_EPOCHS}
GRID_SEARCH: dict[str, tuple[Any, ...]] = {"learning_rate": (5e-4, 1e-3, 2e-3)}
GRID_FRACTION = 0.4  # of the pairs, per epoch: 94 steps
