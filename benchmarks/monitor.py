"""What GradientNormMonitor costs beside a step of a model of ten million parameters.

A CLIP of small transformers (open_clip), batch 128, 64 x 64 pictures of noise. Runs with and without the callback take turns;
the ratio is the median over the pairs, and its spread says how far to trust it on a shared machine. The time inside its
hooks, in the same runs, is all it adds on a CPU but the selective rule itself: one pass over batch x batch scores.

    python benchmarks/monitor.py
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import open_clip
import torch
from torch.utils.data import DataLoader

from lightning_itm import GradientNormMonitor, OpenCLIPDualEncoder, TripletLoss

CONFIG = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 64, "layers": 6, "width": 256, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 8192, "width": 256, "heads": 4, "layers": 4},
}


class Timed(GradientNormMonitor):
    """Count the seconds spent in the hooks of a step."""

    seconds = 0.0

    def on_train_batch_start(self, *arguments: Any) -> None:
        """Time it."""
        self._time(super().on_train_batch_start, *arguments)

    def on_before_optimizer_step(self, *arguments: Any) -> None:
        """Time it."""
        self._time(super().on_before_optimizer_step, *arguments)

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Time it."""
        self._time(super().on_train_batch_end, *arguments)

    def _time(self, hook: Any, *arguments: Any) -> None:
        start = time.perf_counter()
        hook(*arguments)
        self.seconds += time.perf_counter() - start


class Clock(L.Callback):
    """Measure the steps after the first three."""

    start = end = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Start the clock."""
        if trainer.global_step == 3:
            self.start = time.perf_counter()
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, Timed):
                    callback.seconds = 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop it, for now."""
        self.end = time.perf_counter()


def run(model_name: str, steps: int, batch_size: int, monitor: Timed | None) -> float:
    """Return the seconds of all but the first three steps."""
    L.seed_everything(0, verbose=False)
    model = OpenCLIPDualEncoder(model_name, loss=TripletLoss(), warmup_steps=0)
    ids = torch.arange(batch_size)
    image, text = torch.randn(batch_size, 3, 64, 64), torch.randint(1, 8192, (batch_size, 32))
    batches = [{"image": image, "text": text, "image_id": ids, "text_id": ids}] * steps
    clock = Clock()
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[clock, *([monitor] if monitor else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(model, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return clock.end - clock.start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", ""):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ten-million.json"
        path.write_text(json.dumps(CONFIG))
        open_clip.add_model_config(path)
    model = OpenCLIPDualEncoder("ten-million", loss=TripletLoss())
    number = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    ratios, shares, per_step = [], [], []
    for _ in range(args.runs):
        monitor = Timed()
        plain = run("ten-million", args.steps, args.batch_size, None)
        watched = run("ten-million", args.steps, args.batch_size, monitor)
        ratios.append(watched / plain)
        shares.append(100 * monitor.seconds / watched)
        per_step.append(plain / (args.steps - 3))
    print(
        f"{number:.1f} million parameters, batch {args.batch_size}, {args.threads} threads, {args.runs} pairs of runs"
    )
    print(f"a step without: {statistics.median(per_step):.3f} s")
    low, high = sorted(ratios)[0], sorted(ratios)[-1]
    print(f"with / without: median {statistics.median(ratios):.3f}, from {low:.3f} to {high:.3f}")
    print(f"inside the hooks: median {statistics.median(shares):.2f} % of a step")


if __name__ == "__main__":
    main()
