"""The emoji example in every precision: float32, TensorFloat-32, bfloat16, and float16 with a gradient scaler.

InfoNCE and the selective hinge from scratch, then each loss and callback fine-tuned from what InfoNCE reached in the same
precision. For each row: rsum on the test set (mean and standard deviation over the seeds), the paired difference to 32-true,
losses that were not finite, optimizer steps, and steps that the scaler left out. On a CPU, Lightning's 16-mixed has no scaler
and tf32 is float32. Both are left out there.

    python benchmarks/precision_cuda.py --jobs 12
    python benchmarks/precision_cuda.py --device cpu --quick    # see that it runs
"""

import argparse
import logging
import math
import multiprocessing
import statistics
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import open_clip
import torch
from emoji_example import load_example
from timing import Report

FROM_SCRATCH = ("InfoNCE", "selective")
FINE_TUNED = ("InfoNCE", "selective", "FNE", "AOQ+FNE+SelHN")


class Outcome(NamedTuple):
    """What a row came to."""

    rsum: float
    not_finite: int
    asked: int
    skipped: int
    seconds: float


class Steps(L.Callback):
    """Count the optimizer steps that were asked for and those that the scaler left out, by what it did to its scale."""

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
            self.skipped += int(scaler.get_scale() < self.before)


def train(example: Any, args: argparse.Namespace, stage: str, loss: str, start: Path | None) -> tuple[Any, Outcome]:
    """Train a row of the example, and count."""
    steps = Steps()
    plain: Any = L.Trainer

    class Watched(plain):  # type: ignore[misc]  # a class, as the library asks whether a Trainer is one
        def __init__(self, callbacks: list[L.Callback], **options: Any) -> None:
            quiet = [one for one in callbacks if not isinstance(one, example.TQDMProgressBar)]
            super().__init__(callbacks=[steps, *quiet], enable_progress_bar=False, **options)

    example.L.Trainer = Watched
    try:
        row = example.train_row(args, stage, loss, start)
    finally:
        example.L.Trainer = plain
    lost = sum(not math.isfinite(value) for value in row.curves["train/loss"])
    return row, Outcome(row.metrics["test/rsum"], lost, steps.asked, steps.skipped, row.seconds)


def run(job: tuple[str, int], args: argparse.Namespace, folder: Path) -> dict[tuple[str, str], Outcome]:
    """Train all rows in one precision from one seed."""
    precision, seed = job
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", ""):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    else:
        torch.backends.cudnn.allow_tf32 = False
    example = load_example()
    open_clip.add_model_config(example.HERE / "models" / "emoji-clip.json")
    options = ["--seed", str(seed), "--out", str(folder / f"{precision}-{seed}"), "--epochs", str(args.epochs)]
    options += ["--precision", "32-true" if precision == "tf32" else precision]
    options += ["--accelerator", "gpu" if args.device == "cuda" else "cpu", *["--quick"] * args.quick]
    parsed = example.parse_arguments(options)
    if args.quick:
        parsed.epochs = 1
    found, start = {}, None
    for loss in FROM_SCRATCH:
        row, found["from scratch", loss] = train(example, parsed, "from scratch", loss, None)
        print(
            precision, seed, "from scratch", loss, found["from scratch", loss], flush=True
        )  # left if a run breaks off
        start = start or row.checkpoint
    for loss in FINE_TUNED[-1:] if args.quick else FINE_TUNED:
        found["fine-tuned", loss] = train(example, parsed, "fine-tuned", loss, start)[1]
        print(precision, seed, "fine-tuned", loss, found["fine-tuned", loss], flush=True)
    return found


def write(report: Report, row: tuple[str, str], precision: str, outcomes: list[Outcome], floor: list[Outcome]) -> None:
    """Write a row: what the seeds have in common."""
    rsum = [outcome.rsum for outcome in outcomes]
    paired = [outcome.rsum - other.rsum for outcome, other in zip(outcomes, floor, strict=True)]
    spread = [statistics.stdev(values) if len(values) > 1 else math.nan for values in (rsum, paired)]
    report.row(
        " ".join(row),
        precision,
        f"{statistics.mean(rsum):.1f} ± {spread[0]:.1f}",
        f"{statistics.mean(paired):+.1f} ± {spread[1]:.1f}",
        *(str(sum(getattr(outcome, name) for outcome in outcomes)) for name in ("not_finite", "asked", "skipped")),
        f"{statistics.median(outcome.seconds for outcome in outcomes):.0f}",
    )


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--epochs", type=int, default=8, help="from scratch; fine-tuning takes two (default: 8)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=4, help="runs at once, one process each (default: 4)")
    parser.add_argument("--quick", action="store_true", help="a few steps, one seed: see that it runs")
    parser.add_argument("--out", help="a file that the table is written to as well")
    args = parser.parse_args()
    args.seeds = args.seeds[:1] if args.quick else args.seeds
    precisions = ["32-true", "bf16-mixed"] + (["tf32", "16-mixed"] if args.device == "cuda" else [])
    report = Report(
        args.device, args.out, ("loss", 30), ("precision", 12), ("rsum", 15), ("to 32-true", 15), ("not finite", 12),
        ("steps", 7), ("skipped", 9), ("s", 5),
    )  # fmt: skip
    jobs = list(product(precisions, args.seeds))
    # The table is for what is learned, so runs may share a device. `spawn`: a fork would share CUDA's state.
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        found = dict(zip(jobs, pool.map(partial(run, args=args, folder=Path(folder)), jobs), strict=True))
    for row in found[jobs[0]]:
        for precision in precisions:
            outcomes, floor = ([found[name, seed][row] for seed in args.seeds] for name in (precision, "32-true"))
            write(report, row, precision, outcomes, floor)
    report.close(
        f"{args.epochs} epochs from scratch, 2 of fine-tuning, seeds {args.seeds}; counts are sums over the seeds"
    )


if __name__ == "__main__":
    main()
