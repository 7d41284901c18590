"""Flickr8k without its towers: features that are computed once, heads on them, and grids of regions for ResidualVSE.

They are kept beside the photographs: ``features-texts.pt``, ``features-images-SIDE.pt``, and one ``.npy`` of regions and one
list of captions for each split, in the layout of the published region features.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from flickr8k import DIM, SIDE, Towers, folder_of, photographs
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_itm import (
    DualEncoder,
    ImageTextDataModule,
    ImageTextDataset,
    InfoNCELoss,
    RegionFeatureDataset,
    ResidualVSE,
)
from lightning_itm.data import EvaluationItems, collate_pairs

LARGE_SIDE, GRID, IMAGE_DIM, TEXT_DIM = 224, 4, 1280, 384
HEAD_EPOCHS = 20


class Heads(DualEncoder):
    """A linear layer or two for each side, on features that were computed before."""

    def __init__(self, loss: nn.Module, heads: dict[str, nn.Module], dropout: float = 0.5, **knobs: Any) -> None:
        super().__init__(loss, warmup_steps=100, **knobs)
        self.image_encoder = nn.Sequential(nn.Dropout(dropout), heads["image"])
        self.text_encoder = nn.Sequential(nn.Dropout(dropout), heads["text"])

    def encode_image(self, image: Tensor) -> Tensor:
        """Project features of photographs."""
        return self.image_encoder(image)  # type: ignore[no-any-return]

    def encode_text(self, text: Tensor) -> Tensor:
        """Project features of captions."""
        return self.text_encoder(text)  # type: ignore[no-any-return]


class FeaturePairs(ImageTextDataset):
    """Pairs of features in memory."""

    def __init__(self, images: Tensor, texts: Tensor, text_image_id: Tensor) -> None:
        self.images: Any = images
        self.texts, self.text_image_id, self.rows = [str(i) for i in range(len(texts))], text_image_id, texts
        self._set_up(None, None, None)

    def load_image(self, image_id: int) -> Tensor:
        """Return a row."""
        return self.images[image_id]  # type: ignore[no-any-return]

    def load_text(self, text_id: int) -> Tensor:
        """Return a row."""
        return self.rows[text_id]


def _encode(pairs: ImageTextDataset, kind: Literal["image", "text"], encode: Callable[[Any], Tensor]) -> Tensor:
    loader = DataLoader(EvaluationItems(pairs, kind), 50, collate_fn=collate_pairs)
    return torch.cat([encode(batch[kind]) for batch in loader])


@torch.no_grad()
def image_features(folder: Path, side: int) -> dict[str, Tensor]:
    """Return the features of all photographs, `(images, 1280)` in each split, and write the grids of regions."""
    path = folder / f"features-images-{side}.pt"
    if not path.exists():
        trunk, rows = Towers(InfoNCELoss(), side).eval().model.visual.trunk, {}
        for split, pairs in photographs(folder, side).items():
            grids: list[Tensor] = []

            def encode(images: Tensor, grids: list[Tensor] = grids) -> Tensor:
                maps = trunk.forward_features(images)  # (images, 1280, side / 32, side / 32)
                if side == LARGE_SIDE:
                    pooled = nn.functional.adaptive_avg_pool2d(maps, GRID)
                    grids.append(pooled.flatten(2).transpose(1, 2).half())
                return maps.mean((2, 3))  # type: ignore[no-any-return]

            rows[split] = _encode(pairs, "image", encode)
            if grids:
                np.save(folder / f"{split}_ims.npy", torch.cat(grids).numpy())
        torch.save(rows, path)
    return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


@torch.no_grad()
def text_features(folder: Path) -> dict[str, Tensor]:
    """Return the features of all captions, `(texts, 384)` in each split."""
    path = folder / "features-texts.pt"
    if not path.exists():
        model = Towers(InfoNCELoss()).eval()
        model.model.text.proj = nn.Identity()
        texts = {split: _encode(pairs, "text", model.encode_text) for split, pairs in photographs(folder).items()}
        torch.save(texts, path)
    return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


@functools.cache
def features(folder: Path, side: int) -> dict[str, FeaturePairs]:
    """Return the three splits as pairs of features."""
    images, texts = image_features(folder, side), text_features(folder)
    return {
        split: FeaturePairs(images[split], texts[split], pairs.text_image_id)
        for split, pairs in photographs(folder).items()
    }


@functools.cache
def trained_heads(folder: Path | None, _seed: int) -> dict[str, Any]:
    """Return the weights of the towers with heads that are trained on frozen features, once for all seeds."""
    folder = folder_of(folder)
    path, model, loss = folder / f"heads-{SIDE}.pt", Towers(InfoNCELoss()), InfoNCELoss()
    if not path.exists():
        L.seed_everything(0, verbose=False)
        heads = Heads(loss, dict(model.heads().items()), learning_rate=1e-3, weight_decay=0.05)
        silent: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = L.Trainer(max_epochs=HEAD_EPOCHS, accelerator="cpu", limit_val_batches=0, **silent)
        data = ImageTextDataModule(features(folder, SIDE)["train"], batch_size=128, num_workers=0)
        trainer.fit(heads, datamodule=data)
        torch.save({"heads": model.heads().state_dict(), "scale": loss.logit_scale.detach()}, path)
    kept = torch.load(path, weights_only=True)
    model.heads().load_state_dict(kept["heads"])
    return {**model.state_dict(), "loss.logit_scale": kept["scale"]}


def head_data(batch_size: int) -> Callable[[Path | None, int], ImageTextDataModule]:
    """Return what makes the data of pooled features, of photographs of 224 pixels."""

    def make(folder: Path | None, seed: int) -> ImageTextDataModule:
        sets = features(folder_of(folder), LARGE_SIDE)
        options: dict[str, Any] = {"batch_size": batch_size, "num_workers": 0, "seed": seed}
        return ImageTextDataModule(sets["train"], sets["val"], sets["test"], **options)

    return make


def head_model(loss: nn.Module, folder: Path | None, *, hidden: int, **knobs: Any) -> Heads:
    """Make heads with a hidden layer, or linear ones where ``hidden`` is 0."""

    def head(width: int) -> nn.Module:
        if not hidden:
            return nn.Linear(width, DIM)
        return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(knobs["dropout"]), nn.Linear(hidden, DIM))

    return Heads(loss, {"image": head(IMAGE_DIM), "text": head(TEXT_DIM)}, **knobs)


@functools.cache
def grids(folder: Path) -> dict[str, RegionFeatureDataset]:
    """Return 4 x 4 regions of each photograph with its captions, in the layout of the published features."""
    sets: dict[str, RegionFeatureDataset] = {}
    image_features(folder, LARGE_SIDE)
    for split, pairs in photographs(folder).items():
        captions = folder / f"{split}_caps.txt"
        if not captions.exists():
            captions.write_text("".join(text.strip() + "\n" for text in pairs.texts), encoding="utf-8")
        vocabulary = sets["train"].vocabulary if sets else None
        sets[split] = RegionFeatureDataset.from_scan(folder, split, vocabulary=vocabulary)
    return sets


def grid_data(folder: Path | None, seed: int) -> ImageTextDataModule:
    """Return batches of 128 sets of regions with their captions."""
    sets = grids(folder_of(folder))
    options: dict[str, Any] = {"batch_size": 128, "num_workers": 0, "seed": seed}
    return ImageTextDataModule(sets["train"], sets["val"], sets["test"], **options)


def grid_model(loss: nn.Module, folder: Path | None, **knobs: Any) -> ResidualVSE:
    """Make the model of RVSE++ with a width of 256."""
    vocabulary = grids(folder_of(folder))["train"].vocabulary
    return ResidualVSE(len(vocabulary), IMAGE_DIM, 256, 300, loss, **knobs)
