"""Make the pictures of the gallery and of the README from runs on emoji.

    python tools/gallery.py                      # all of them, about three minutes on one core
    python tools/gallery.py --only monitor       # gradients.png and recall.png
    python tools/gallery.py --only negatives     # mined.png, bank.png, curves.png and readme.png

Pictures go to ``docs/assets/gallery``. Everything runs on the CPU, with fixed seeds. Images: Twemoji, copyright Twitter, Inc.
and other contributors, CC-BY 4.0. They come with the extra ``[demo]``.
"""

import argparse
import io
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image
from torch import Tensor, nn

from lightning_itm import (
    GradientNormMonitor,
    ImageTextDataModule,
    ImageTextDataset,
    ImageTextRetrieval,
    OfflineHardNegativeMining,
    TripletLoss,
)
from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.mining import NegativeTable, contact_sheet

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import train_on_emoji as example  # noqa: E402
from emoji_data import picture_files, small_pictures  # noqa: E402

FOLDER = ROOT / "docs" / "assets" / "gallery"
SEEDS = 1, 0  # what is mined with the last one is drawn
ON_README = (
    "purple heart",
    "neutral face",
    "woman rowing boat",
    "right arrow curving down",
)  # what the first picture shows


class Deep(example.Small):
    """The small model with a deeper text tower. From random weights, its texts lie close together, and it can collapse."""

    def __init__(self, loss: nn.Module, learning_rate: float = 1e-3) -> None:
        super().__init__(loss, learning_rate, warmup_steps=0)
        self.head = nn.Sequential(nn.Linear(example.DIM, example.DIM), nn.ReLU(), nn.Linear(example.DIM, example.DIM))

    def encode_text(self, text: Tensor) -> Tensor:
        """Encode names."""
        return self.head(super().encode_text(text))  # type: ignore[no-any-return]


def save(figure: Any, name: str) -> None:
    """Write a figure as a PNG of at most 256 colours, which is small."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=figure.dpi)
    with Image.open(buffer) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(FOLDER / name, optimize=True)
    print(f"{name}: {(FOLDER / name).stat().st_size / 1024:.0f} KB", flush=True)


def recall(model: Deep, pairs: ImageTextDataset) -> ImageTextRetrieval:
    """Return the metric of a set."""
    metric, view, ids = ImageTextRetrieval(), pairs.evaluation(), torch.arange(len(pairs))
    model.eval()
    with torch.no_grad():
        image = model.encode_image(torch.stack([view[i]["image"] for i in range(len(view))]))
        text = model.encode_text(torch.stack([view[i]["text"] for i in range(len(view))]))
    normalize = nn.functional.normalize
    metric.update(EmbeddingPairs(normalize(image, dim=1), normalize(text, dim=1), ids, ids))
    return metric


def draw_monitor() -> None:
    """Train with the hardest negative from random weights, without and with the monitor, and draw both."""
    train, val, test = small_pictures()
    monitor, figure = GradientNormMonitor(), Figure(figsize=(9, 3.6), layout="constrained")
    runs = {"hardest negatives alone": [], "with GradientNormMonitor": [monitor]}
    for ax, (name, callbacks) in zip(figure.subplots(1, 2, sharey=True), runs.items(), strict=True):
        L.seed_everything(0, verbose=False)
        data = ImageTextDataModule(train, val, batch_size=64, num_workers=0, seed=0)
        model = Deep(TripletLoss(margin=0.2, negatives="hardest"))
        example.train(model, data, 12, list(callbacks))
        metric = recall(model, test)
        metric.plot(ax=ax)
        ax.set(title=f"{name}, rsum {float(metric.compute()['rsum']):.0f}")
        ax.spines[["top", "right"]].set_visible(False)
    save(monitor.plot(), "gradients.png")
    save(figure, "recall.png")


def draw_negatives() -> None:
    """Train the rows of ``train_on_emoji.py --quick``, and draw what was mined, the bank and the curves."""
    args = argparse.Namespace(pretrained=False, start_epochs=None, epochs=None, rate=None)
    rows = {name: example.Row() for name in example.QUICK}
    callbacks: dict[str, Any] = {}
    for seed in SEEDS:
        example.run_seed(args, seed, rows, callbacks)
    example.plot(rows, FOLDER / "curves.png")
    with Image.open(FOLDER / "curves.png") as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(FOLDER / "curves.png", optimize=True)
    mining: OfflineHardNegativeMining = callbacks["hard batches, OfflineHardNegativeMining"]
    assert mining.table is not None
    files = picture_files()[0]  # the same set with 72 pixels, where the model has 24
    save(contact_sheet(files, mining.table, 6, seed=4), "mined.png")
    save(callbacks["memory bank, FalseNegativeElimination"].plot(), "bank.png")
    save(readme_sheet(files, mining.table), "readme.png")


def readme_sheet(pairs: ImageTextDataset, table: NegativeTable) -> Figure:
    """Draw a few pairs with their hardest texts and images, 900 x 300 pixels at twice the resolution."""
    figure = Figure(figsize=(9, 3), dpi=200)
    chosen = [pairs.texts.index(text) for text in ON_README]
    top, height = 0.88, 0.88 / len(chosen)
    for x, title in ((0.01, "a pair"), (0.355, "hardest negative texts"), (0.63, "hardest negative images")):
        figure.text(x, 0.975, title, va="top", fontsize=9, color="0.45")
    for number, index in enumerate(chosen):
        bottom = top - (number + 1) * height
        middle = bottom + height / 2
        figure.add_artist(_line(bottom + height))
        _picture(figure, pairs, index, 0.01, bottom, height)
        figure.text(0.087, middle, pairs.texts[index], va="center", fontsize=10, fontweight="bold")
        texts = [pairs.texts[other] for other in table.texts[index, :3].tolist()]
        figure.text(0.355, middle, "\n".join(texts), va="center", fontsize=8, color="tab:red", linespacing=1.35)
        for place, other in enumerate(table.images[index, :5].tolist()):
            _picture(figure, pairs, other, 0.63 + 0.0735 * place, bottom, height)
    return figure


def _line(height: float) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([0.01, 0.99], [height, height], color="0.88", linewidth=0.8)


def _picture(figure: Figure, pairs: ImageTextDataset, index: int, left: float, bottom: float, height: float) -> None:
    ax = figure.add_axes((left, bottom + 0.1 * height, 0.065, 0.8 * height))
    ax.imshow(imread(pairs.images[index]), interpolation="lanczos")
    ax.set_axis_off()


def main() -> None:
    """Draw all, or one half."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("monitor", "negatives"), help="one half of the pictures")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    FOLDER.mkdir(parents=True, exist_ok=True)
    if options.only != "negatives":
        draw_monitor()
    if options.only != "monitor":
        draw_negatives()


if __name__ == "__main__":
    main()
