"""Does it help on icons to drop likely false negatives from a memory bank? Used by false_negatives.py."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
from icons import IconEncoder, Icons, embed_all, load_icons
from posteriors import print_posteriors

from lightning_itm import (
    FalseNegativeElimination,
    FalseNegativeSampler,
    ImageTextDataModule,
    ImageTextRetrieval,
    InfoNCELoss,
)

START_EPOCHS, FINETUNE_EPOCHS, POSTERIOR_EPOCHS = 6, 2, 2
RATE, FINETUNE_RATE = 3e-3, 1e-3
SILENT: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
RULES: dict[str, dict[str, Any] | None] = {
    "no bank": None,
    "bank, no elimination": {"min_count": 10**9},
    "bank, drop, published": {"posterior": "published", "weighting": "drop"},
    "bank, drop": {"weighting": "drop"},
    "bank, complement": {"weighting": "complement"},
}


def train(
    icons: Icons,
    seed: int,
    epochs: int,
    rate: float,
    start: dict[str, Any] | None = None,
    rule: dict[str, Any] | None = None,
) -> tuple[IconEncoder, float]:
    """Train with InfoNCE, and return the model and its rsum on icons whose names occur once."""
    L.seed_everything(seed, verbose=False)
    model = IconEncoder(InfoNCELoss(), learning_rate=rate, warmup_steps=50, weight_decay=0.01)
    if start is not None:
        model.load_state_dict(start)
    sampler = None if rule is None else FalseNegativeSampler(**rule, seed=seed)
    callbacks: list[Any] = [] if sampler is None else [FalseNegativeElimination(4096, sampler=sampler)]
    trainer = L.Trainer(max_epochs=epochs, gradient_clip_val=2.0, callbacks=callbacks, **SILENT)
    trainer.fit(model, datamodule=ImageTextDataModule(icons.train, batch_size=128, num_workers=0, seed=seed))
    metric = ImageTextRetrieval()
    metric.update(embed_all(model, icons.test))
    return model, float(metric.compute()["rsum"])


def posteriors_on_icons(folder: Path, seeds: list[int]) -> None:
    """Train for two epochs, and print which duplicates are recognised in the embeddings."""
    icons = load_icons(folder)
    model, rsum = train(icons, seeds[0], POSTERIOR_EPOCHS, RATE)
    print(f"{POSTERIOR_EPOCHS} epochs of InfoNCE, rsum {rsum:.1f}", flush=True)
    print_posteriors(embed_all(model, icons.train), icons.caption)


def compare_on_icons(folder: Path, seeds: list[int]) -> None:
    """Fine-tune a converged model with each rule, and print rsum."""
    icons = load_icons(folder)
    for seed in seeds:
        model, rsum = train(icons, seed, START_EPOCHS, RATE)
        start = copy.deepcopy(model.state_dict())
        print(f"seed {seed}, start, {START_EPOCHS} epochs: rsum {rsum:.1f}", flush=True)
        for name, rule in RULES.items():
            _, rsum = train(icons, seed + 100, FINETUNE_EPOCHS, FINETUNE_RATE, start, rule)
            print(f"seed {seed}, {name}: rsum {rsum:.1f}", flush=True)
