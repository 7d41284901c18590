"""Does RVSE++ learn from scratch where VSE++ does not? On a folder in the layout of the published region features.

Emoji are cut into 6 x 6 patches; a patch's pixels, 432 numbers, are a region's features. They are written as
``train_ims.npy`` (float16) and ``train_caps.txt``, and mapped. From random weights, with the same data, steps and rate:

- VSE++: the hardest negative, no residual block;
- VSE++ with GradientNormMonitor;
- RVSE++: selective hard negatives and the residual block.

Rsum on held-out emoji for each seed, mean and standard deviation. Split, epochs and learning rate (that of the paper) were set
before these runs were looked at.

    python benchmarks/residual_vse.py --seeds 0 1 2      # about eight minutes on two cores
"""

import argparse
import logging
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from emoji_example import load_example
from PIL import Image
from torch import Tensor

from lightning_itm import GradientNormMonitor, ImageTextDataModule, RegionFeatureDataset, ResidualVSE, TripletLoss
from lightning_itm.data import PaddedSequence, Vocabulary
from lightning_itm.models import RegionEncoder

PATCH, GRID = 12, 6
ROWS = ("VSE++", "VSE++, monitored", "RVSE++")


class PlainEncoder(RegionEncoder):
    """Project and pool; no residual block."""

    def __init__(self, image_dim: int, embed_dim: int) -> None:
        super().__init__(image_dim, embed_dim)
        for part in (self.down, self.norm, self.up):
            part.requires_grad_(False)

    def forward(self, regions: PaddedSequence) -> Tensor:
        """Return `(images, embed_dim)`."""
        pooled: Tensor = self.pooling(self.fc(regions.values), regions.lengths)
        return pooled


def patches(path: Path) -> "np.ndarray[Any, Any]":
    """Cut a picture into a grid, `(36, 432)`, in [−1, 1]."""
    image = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    pixels = np.asarray(
        Image.alpha_composite(white, image).convert("RGB").resize((PATCH * GRID,) * 2), dtype=np.float32
    )
    grid = (pixels / 127.5 - 1).reshape(GRID, PATCH, GRID, PATCH, 3).transpose(0, 2, 1, 3, 4)
    return grid.reshape(GRID * GRID, -1)


def write(folder: Path, split: str, items: list[Any]) -> None:
    """Write a split in SCAN's layout, one caption an image."""
    np.save(folder / f"{split}_ims.npy", np.stack([patches(item.image) for item in items]).astype(np.float16))
    (folder / f"{split}_caps.txt").write_text("".join(f"{item.name}\n" for item in items), encoding="utf-8")


def run(args: argparse.Namespace, folder: Path, row: str, seed: int) -> tuple[float, float, list[float]]:
    """Return rsum, the mean loss of the last epoch, and where the switch was on."""
    L.seed_everything(seed, verbose=False)
    names = (folder / "train_caps.txt").read_text(encoding="utf-8").splitlines()
    shared: dict[str, Any] = {"captions_per_image": 1, "vocabulary": Vocabulary.build(names, min_count=2)}
    train, test = (RegionFeatureDataset.from_scan(folder, split, **shared) for split in ("train", "test"))
    loss = TripletLoss(negatives="selective" if row == "RVSE++" else "hardest")
    model = ResidualVSE(len(train.vocabulary), PATCH * PATCH * 3, args.embed_dim, 128, loss)
    if row != "RVSE++":
        model.image_encoder = PlainEncoder(PATCH * PATCH * 3, args.embed_dim)
    monitor = GradientNormMonitor()
    losses: list[float] = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))

    trainer = L.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=[Losses(), *([monitor] if row == "VSE++, monitored" else [])],
        gradient_clip_val=2.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = ImageTextDataModule(train, test_dataset=test, batch_size=128, num_workers=0, seed=seed)
    trainer.fit(model, datamodule=data)
    rsum = float(trainer.test(model, datamodule=data, verbose=False)[0]["test/rsum"])
    last = losses[-len(losses) // args.epochs :]
    return rsum, statistics.mean(last), monitor.curves()["selective"] if row == "VSE++, monitored" else []


def main() -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--embed-dim", type=int, default=256)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", ""):
        logging.getLogger(name).setLevel(logging.ERROR)
    train, _, test = load_example().split()
    results: dict[str, list[tuple[float, float]]] = {row: [] for row in ROWS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, "train", train)
        write(folder, "test", test)
        for seed in args.seeds:
            for row in ROWS:
                rsum, loss, switch = run(args, folder, row, seed)
                results[row].append((rsum, loss))
                on = f", on in {sum(switch):.0f} of {len(switch)} steps" if switch else ""
                print(f"seed {seed}, {row}: rsum {rsum:.1f}, training loss {loss:.3f}{on}", flush=True)
    print(f"\n{'':20}{'rsum':>18}{'training loss':>18}   ({args.epochs} epochs, margin 0.2)")
    for row, values in results.items():
        cells = [
            f"{statistics.mean(column):.3f} ± {statistics.stdev(column) if len(column) > 1 else 0:.3f}"
            for column in zip(*values, strict=True)
        ]
        print(f"{row:20}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    main()
