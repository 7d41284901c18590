"""Does every option that trains, train? Each loss with each source of negatives, from a converged small model.

A small CNN and a bag of character pieces are trained on emoji with InfoNCE. From there, each setting trains for some hundred
steps. The table has rsum on held-out emoji, its difference to the same loss alone, and the mean cosine of pairs that do not
match, which shows a collapse. No setting may end more than 4 below its loss alone.

    python benchmarks/every_option.py              # about three minutes on two cores
    python benchmarks/every_option.py --seeds 0 1 2
    python benchmarks/every_option.py --only bank  # settings whose name has this in it
"""

import argparse
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from torch import nn

from lightning_itm import (
    FalseNegativeElimination,
    FalseNegativeSampler,
    GradientNormMonitor,
    ImageTextDataModule,
    ImageTextRetrieval,
    InfoNCELoss,
    OfflineHardNegativeMining,
    QuintupletLoss,
    SigmoidLoss,
    TripletLoss,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from emoji_data import small_pictures
from train_on_emoji import Small

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "InfoNCE": InfoNCELoss,
    "sigmoid": lambda: SigmoidLoss(2.7, -5.0),
    "triplet": TripletLoss,
    "quintuplet": QuintupletLoss,
}
SOURCES: dict[str, dict[str, Any]] = {
    "bank": {},
    "bank, papers' start": {"start_epoch": 0},
    "bank, queue 256": {"queue_size": 256},
    "bank, drop": {"sampler": {"weighting": "drop"}},
    "bank, complement": {"sampler": {"weighting": "complement"}},
    "bank, no cut": {"sampler": {"cut_down": "off"}},
    "samples": {},
    "samples, uncoupled": {"coupled_ranks": False},
    "embeddings": {},
    "embeddings, uncoupled": {"coupled_ranks": False},
    "monitor": {},
    "bank, embeddings": {},
    "bank, samples": {},
    "batches": {},
    "batches of 16": {"group_size": 16},
    "batches, training": {"encode": "training"},
    "bank, batches": {},
    "hardness": {},
}
HARDNESS: dict[str, Callable[[], nn.Module]] = {
    "InfoNCE": lambda: InfoNCELoss(hardness=5.0),
    "sigmoid": lambda: SigmoidLoss(2.7, -5.0, hardness=5.0),
}


class Outcome(NamedTuple):
    """What a setting ended with."""

    rsum: float
    cosine: float


def make_data(batch_size: int, seed: int) -> ImageTextDataModule:
    """Read the emoji into memory, small."""
    return ImageTextDataModule(*small_pictures(), batch_size=batch_size, num_workers=0, seed=seed)


def run(model: Small, data: ImageTextDataModule, epochs: int, callbacks: list[L.Callback]) -> None:
    """Train."""
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)


@torch.no_grad()
def evaluate(model: Small, data: ImageTextDataModule) -> Outcome:
    """Compute rsum on the test set, and the mean cosine of pairs that do not match."""
    model.eval()
    metric, cosines = ImageTextRetrieval(), []
    for batch in data.test_dataloader():
        pairs = model.embed(batch)
        metric.update(pairs)
        similarity = pairs.image_embeddings @ pairs.text_embeddings.T
        cosines.append(similarity[~torch.eye(len(pairs), dtype=torch.bool)].mean().item())
    model.train()
    return Outcome(float(metric.compute()["rsum"]), statistics.mean(cosines))


def make_callbacks(source: str, seed: int) -> list[L.Callback]:
    """Build the callbacks of a setting."""
    options = dict(SOURCES.get(source, {}))
    callbacks: list[L.Callback] = []
    if "bank" in source:
        sampler = FalseNegativeSampler(seed=seed, **options.pop("sampler", {}))
        callbacks.append(FalseNegativeElimination(**{"queue_size": 1024, "momentum": 0.99, **options}, sampler=sampler))
        options = {}
    modes: tuple[Literal["samples", "embeddings", "batches"], ...] = ("samples", "embeddings", "batches")
    common: dict[str, Any] = {"texts_per_image": 30, "images_per_text": 30, "relative_margin": 0.05, "num_workers": 0}
    callbacks += [
        OfflineHardNegativeMining(inject=mode, seed=seed, **common, **options) for mode in modes if mode in source
    ]
    if source == "monitor":
        callbacks.append(GradientNormMonitor())
    return callbacks


def settings(only: str) -> Iterator[tuple[str, str]]:
    """Yield each loss with each source that it can take."""
    for loss in LOSSES:
        for source in ("alone", *SOURCES):
            if source == "alone" or (_differs(loss, source) and only in f"{loss} {source}"):
                yield loss, source


def _differs(loss: str, source: str) -> bool:
    """Tell whether a source means something for a loss that it does not mean for another one already."""
    if loss == "quintuplet":  # without mined negatives it is the triplet loss
        return "samples" in source or "embeddings" in source
    if source == "hardness":
        return loss in HARDNESS
    if "batches" in source:  # the sigmoid loss refuses them
        return loss == "InfoNCE" or (loss == "triplet" and source == "batches")
    return source != "monitor" or loss == "triplet"


def run_seed(seed: int, epochs: int, only: str = "", batch_size: int = 64) -> dict[tuple[str, str], Outcome]:
    """Train the start, and each setting from there."""
    L.seed_everything(seed, verbose=False)
    data = make_data(batch_size, seed)
    starts = {}
    outcomes = {}
    for loss in ("InfoNCE", "sigmoid"):  # hinges start from InfoNCE
        starts[loss] = start = Small(LOSSES[loss](), 3e-3)
        run(start, data, 12, [])
        outcomes["start", loss] = evaluate(start, data)
        print(f"seed {seed}, start with {loss}: {outcomes['start', loss]}", flush=True)
    for loss, source in settings(only):
        L.seed_everything(seed, verbose=False)
        model = Small((HARDNESS if source == "hardness" else LOSSES)[loss]())
        weights = starts.get(loss, starts["InfoNCE"]).state_dict()
        kept = {name: value for name, value in weights.items() if loss in starts or not name.startswith("loss.")}
        model.load_state_dict(kept, strict=False)
        began = time.perf_counter()
        run(model, data, epochs, make_callbacks(source, seed))
        outcomes[loss, source] = outcome = evaluate(model, data)
        gain = outcome.rsum - outcomes[loss, "alone"].rsum
        seconds = time.perf_counter() - began
        print(
            f"seed {seed}, {loss:12}{source:24}{outcome.rsum:8.1f}{gain:+8.1f}{outcome.cosine:8.3f}{seconds:7.1f} s",
            flush=True,
        )
    return outcomes


def main() -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=6, help="with each setting (6)")
    parser.add_argument("--only", default="", help="settings whose name has this in it")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", ""):
        logging.getLogger(name).setLevel(logging.ERROR)
    results = [run_seed(seed, args.epochs, args.only) for seed in args.seeds]
    print(f"\n{'':36}{'rsum':>8}{'beside alone':>16}{'worst':>8}{'cosine':>8}")
    for key in results[0]:
        alone = [result.get((key[0], "alone"), result[key]).rsum for result in results]
        gains = [result[key].rsum - one for result, one in zip(results, alone, strict=True)]
        spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
        rsum = statistics.mean(result[key].rsum for result in results)
        cosine = max(result[key].cosine for result in results)
        gain = f"{statistics.mean(gains):+8.1f} ± {spread:5.1f}"
        print(f"{key[0]:12}{key[1]:24}{rsum:8.1f}{gain:>16}{min(gains):8.1f}{cosine:8.3f}")


if __name__ == "__main__":
    main()
