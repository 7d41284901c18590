"""What a training step costs on a GPU with each callback: ViT-B-32, batch 512, bf16-mixed, from random weights.

The bare module; with `GradientNormMonitor`; with hardness weights; with offline negatives as embeddings; with
`FalseNegativeElimination` and a queue of 65,536; and the floor of the last: the bare module with one more forward pass, by a
copy without gradient, and the update of its weights. Hard batches have no row: they differ in which pairs they hold, and after
a pass before the epoch their callback does nothing in a step. Batches are on the device already, so that it is the step that
is timed and no loader. One model goes through all ways, which take turns. Ratios are to the bare module in the same turn.

    python benchmarks/step_cuda.py
    python benchmarks/step_cuda.py --device cpu --quick    # see that it runs
"""

import argparse
import functools
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from timing import Report, synchronize
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from lightning_itm import FalseNegativeElimination, GradientNormMonitor, InfoNCELoss, OpenCLIPDualEncoder, TripletLoss
from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.memory_bank import MomentumEncoder
from lightning_itm.mining import EmbeddedNegatives

WARMUP = 10  # steps that are not timed
QUEUE = 65_536


class Clock(L.Callback):
    """Time all steps but the first ones, from one end of the queue of the device to the other."""

    def __init__(self, device: str, warmup: int) -> None:
        self.device, self.warmup, self.seconds = device, warmup, 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Start the clock after the last step of the warm-up."""
        if trainer.global_step == self.warmup:
            synchronize(self.device)
            self.seconds = -time.perf_counter()

    def on_train_end(self, *_: Any) -> None:
        """Stop it."""
        synchronize(self.device)
        self.seconds += time.perf_counter()


class Drawn(L.Callback):
    """What `OfflineHardNegativeMining(inject="embeddings")` does at a step, with random negatives of COCO's size."""

    def __init__(self, num_images: int, dim: int, device: str) -> None:
        image, text = (
            normalize(torch.randn(number, dim, device=device), dim=1) for number in (num_images, 5 * num_images)
        )
        texts = torch.randint(5 * num_images, (num_images, 300), dtype=torch.int32, device=device)
        images = torch.randint(num_images, (5 * num_images, 60), dtype=torch.int32, device=device)
        self.embedded = EmbeddedNegatives(image, text, texts, images, torch.arange(5 * num_images, device=device) // 5)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        """Draw."""
        batch["hard"] = self.embedded.draw(batch["image_id"], batch["text_id"], trainer.current_epoch)


class Slow(L.Callback):
    """One forward pass of a momentum copy, and its update: what a memory bank cannot do without."""

    encoder: MomentumEncoder

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy the module."""
        self.encoder = MomentumEncoder(pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        """Embed."""
        with trainer.precision_plugin.forward_context():
            self.pairs: EmbeddingPairs = self.encoder(batch)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Follow."""
        self.encoder.update(pl_module)


def make_batches(model: OpenCLIPDualEncoder, number: int, args: argparse.Namespace) -> list[dict[str, Tensor]]:
    """Make batches of noise on the device, two that take turns."""
    size, context = model.model.visual.image_size[0], model.model.context_length
    batches = []
    for first in (0, args.batch_size):
        ids = torch.arange(first, first + args.batch_size, device=args.device)
        image = torch.randn(args.batch_size, 3, size, size, device=args.device)
        text = torch.randint(1, 1000, (args.batch_size, context), device=args.device)
        batches.append({"image": image, "text": text, "image_id": ids, "text_id": ids})
    return [dict(batches[place % 2]) for place in range(number)]


def run(model: OpenCLIPDualEncoder, callbacks: list[L.Callback], loss: nn.Module, args: argparse.Namespace) -> float:
    """Return the seconds of a step."""
    model.loss = loss.to(args.device)
    clock = Clock(args.device, args.warmup)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="gpu" if args.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed",
        callbacks=[clock, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = make_batches(model, args.warmup + args.steps, args)
    trainer.fit(model, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return clock.seconds / int(args.steps)


def ways_of(queue: int, drawn: Drawn) -> dict[str, tuple[Callable[[], nn.Module], list[L.Callback]]]:
    """Return a loss and callbacks for each row."""
    hard = functools.partial(InfoNCELoss, hardness=9)
    return {
        "bare": (TripletLoss, []),
        "bare + a momentum forward": (TripletLoss, [Slow()]),
        "bare, InfoNCE": (InfoNCELoss, []),
        "GradientNormMonitor": (TripletLoss, [GradientNormMonitor()]),
        "FNE": (TripletLoss, [FalseNegativeElimination(queue, start_epoch=0)]),
        "hardness weights, InfoNCE": (hard, []),
        "offline negatives, InfoNCE": (InfoNCELoss, [drawn]),
        "FNE, InfoNCE": (InfoNCELoss, [FalseNegativeElimination(queue, start_epoch=0)]),
    }


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=5.0, help="start no further turn after as many")
    parser.add_argument("--quick", action="store_true", help="batch 4, two steps, a queue of 64: see that it runs")
    parser.add_argument("--out", help="a file that the table is written to as well")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", ""):
        logging.getLogger(name).setLevel(logging.ERROR)
    args.warmup, queue, num_images = WARMUP, QUEUE, 113_287
    if args.quick:
        args.batch_size, args.steps, args.runs, args.warmup, queue, num_images = 4, 2, 1, 1, 64, 100
    began = time.perf_counter()
    L.seed_everything(0, verbose=False)
    model = OpenCLIPDualEncoder(args.model, loss=InfoNCELoss(), learning_rate=1e-5, warmup_steps=0)
    drawn = Drawn(num_images, 512, args.device)
    seconds: dict[str, list[float]] = {}
    turns = 0
    while turns < args.runs and (turns == 0 or time.perf_counter() - began < 60 * args.minutes):
        for name, (loss, callbacks) in ways_of(queue, drawn).items():
            seconds.setdefault(name, []).append(run(model, callbacks, loss(), args))
            # A run that breaks off leaves these lines.
            print(f"turn {turns}: {name}, {1000 * seconds[name][-1]:.1f} ms per step", flush=True)
        turns += 1
    report = Report(args.device, args.out, ("step", 32), ("ms", 9), ("to bare", 9), ("to momentum", 13))
    for name, times in seconds.items():
        floors = seconds["bare, InfoNCE" if name.endswith("InfoNCE") else "bare"], seconds["bare + a momentum forward"]
        ratios = [statistics.median(a / b for a, b in zip(times, floor, strict=True)) for floor in floors]
        report.row(name, 1000 * statistics.median(times), *ratios)
    report.close(f"{args.model}, batch {args.batch_size}, queue {queue}, median of {turns} runs of {args.steps} steps")


if __name__ == "__main__":
    main()
