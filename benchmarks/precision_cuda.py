"""The emoji example in three precisions: float32, bfloat16 and float16 with a gradient scaler.

For each loss from scratch: rsum on the test set, the last epoch's loss, losses that were not finite, and steps that the scaler
left out. On a CPU, 16-mixed has no scaler in Lightning and is left out.

    python benchmarks/precision_cuda.py
    python benchmarks/precision_cuda.py --device cpu --quick    # see that it runs
"""

import argparse
import logging
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import open_clip
import torch
from emoji_mining import load_example
from timing import Report

LOSSES = ("InfoNCE", "selective", "monitored", "FNE", "AOQ")


class Steps(L.Callback):
    """Count the optimizer steps that were asked for and those that the scaler let pass, by what it did to its scale."""

    asked = skipped = 0

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        """Look at the scale before."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.before = None if scaler is None else scaler.get_scale()
        self.asked += 1

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Look at it after: it falls where a gradient was not finite."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and self.before is not None:
            self.skipped += scaler.get_scale() < self.before


def train(example: Any, loss: str, precision: str, args: argparse.Namespace, folder: Path) -> tuple[Any, Steps]:
    """Train a row of the example, and count."""
    steps, arguments = Steps(), ["--precision", precision, "--out", str(folder / precision), "--memory", "--mining"]
    arguments += ["--accelerator", "gpu" if args.device == "cuda" else "cpu", "--num-workers", str(args.num_workers)]
    parsed = example.parse_arguments([*arguments, *["--quick"] * args.quick, "--epochs", str(args.epochs)])
    if args.quick:
        parsed.epochs = 1
    plain: Any = L.Trainer

    def watched(callbacks: list[L.Callback], **options: Any) -> L.Trainer:
        quiet = [one for one in callbacks if not isinstance(one, example.TQDMProgressBar)]
        trainer: L.Trainer = plain(callbacks=[steps, *quiet], enable_progress_bar=False, **options)
        return trainer

    example.L.Trainer = watched
    try:
        return example.train_row(parsed, "from scratch", loss), steps
    finally:
        example.L.Trainer = plain


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="eight steps of two losses: see that it runs")
    parser.add_argument("--out", help="a file that the table is written to as well")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", ""):
        logging.getLogger(name).setLevel(logging.ERROR)
    example = load_example()
    open_clip.add_model_config(example.HERE / "models" / "emoji-clip.json")
    report = Report(
        args.device, args.out, ("loss", 12), ("precision", 12), ("rsum", 8), ("final loss", 12), ("not finite", 12),
        ("steps", 7), ("skipped", 9), ("s", 7),
    )  # fmt: skip
    precisions = ["32-true", "bf16-mixed", *["16-mixed"] * (args.device == "cuda")]
    with tempfile.TemporaryDirectory() as folder:
        for loss in LOSSES[-2:] if args.quick else LOSSES:
            for precision in precisions:
                row, steps = train(example, loss, precision, args, Path(folder))
                lost = sum(not math.isfinite(value) for value in row.curves["train/loss"])
                counts = str(lost), str(steps.asked), str(int(steps.skipped))
                report.row(loss, precision, row.metrics["test/rsum"], row.final_loss, *counts, f"{row.seconds:.0f}")
    report.close(
        f"{args.epochs} epochs from scratch, seed 0; PyTorch's float32 products are '{precision_of_products()}'"
    )


def precision_of_products() -> str:
    """Return what 32-true means for matrix products here."""
    return torch.get_float32_matmul_precision()


if __name__ == "__main__":
    main()
