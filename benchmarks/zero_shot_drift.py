"""What does fine-tuning on a narrow domain cost elsewhere, and does mixing the weights (WiSE-FT) bring it back?

A small CLIP is trained from scratch with InfoNCE on all training emoji of the examples. Then it is fine-tuned
on the narrow domain alone: emoji whose name has one of the words in PEOPLE. Rsum is of the held-out emoji of that domain.
Zero-shot accuracy is of all other held-out emoji, classes that the fine-tuning never sees: one class a name, the skin tone
left out of it, so that tones of one gesture are images of one class. Both are measured before, after, and at shares of the
fine-tuned weights between. Words, epochs and learning rates were set before these runs were looked at, and nothing is chosen
by the results. Batch statistics are mixed as weights are. About five minutes a seed on one core.

    python benchmarks/zero_shot_drift.py --seeds 0 1 2
"""

import argparse
import copy
import logging
import re
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import open_clip
import torch
from emoji_example import load_example
from torch import nn
from torch.utils.data import DataLoader

from lightning_itm import (
    ImageTextDataModule,
    ImageTextDataset,
    InfoNCELoss,
    OfflineHardNegativeMining,
    OpenCLIPDualEncoder,
    QuintupletLoss,
    TripletLoss,
    interpolate_weights,
    zero_shot_accuracy,
)

PEOPLE = {
    "person", "people", "man", "men", "woman", "women", "boy", "girl", "child", "baby", "adult", "family", "couple",
}  # fmt: skip
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "InfoNCE": InfoNCELoss,
    "hardest": lambda: TripletLoss(0.2, "hardest"),
    "selective": lambda: TripletLoss(0.2, "selective"),
    "AOQ": lambda: QuintupletLoss(TripletLoss(0.2, "hardest")),
}
SHARES = (0.25, 0.5, 0.75, 1.0)
Measured = dict[tuple[str, float], tuple[float, float, float]]


def is_narrow(item: Any) -> bool:
    return bool(item.words & PEOPLE)


def without_tone(name: str) -> str:
    return re.sub(r"[:,]? (?:light|medium-light|medium|medium-dark|dark) skin tone", "", name)


def other_classes(items: Sequence[Any], transform: Any) -> tuple[DataLoader[Any], list[str]]:
    """Return images with labels, and the names of the labels."""
    others = [item for item in items if not is_narrow(item)]
    names = sorted({without_tone(item.name) for item in others})
    pairs = ImageTextDataset([item.image for item in others], [item.name for item in others], transform=transform)
    labelled = [(pairs.load_image(i), names.index(without_tone(item.name))) for i, item in enumerate(others)]
    return DataLoader(labelled, batch_size=256), names  # type: ignore[arg-type]  # a list is as good


class Bench:
    """One seed: a model, the narrow data, the other classes."""

    def __init__(self, example: Any, args: argparse.Namespace, seed: int) -> None:
        self.args = example.parse_arguments(
            ["--seed", str(seed), "--out", str(args.out / str(seed)), "--epochs", str(args.epochs)]
        )
        self.finetune_epochs, self.seed = args.finetune_epochs, seed
        start = example.train_row(self.args, "from scratch", "InfoNCE")
        self.weights = torch.load(start.checkpoint, weights_only=True)["state_dict"]
        train, val, test = example.split()
        train, narrow_test = ([item for item in items if is_narrow(item)] for items in (train, val + test))
        transforms = self.model("InfoNCE").transforms
        self.others, self.names = other_classes(val + test, transforms["eval_transform"])
        self.data = ImageTextDataModule(
            ImageTextDataset(
                [item.image for item in train], [[item.name, *item.aliases] for item in train], **transforms
            ),
            None,
            ImageTextDataset([item.image for item in narrow_test], [item.name for item in narrow_test], **transforms),
            batch_size=128,
            num_workers=0,
            seed=seed,
        )
        self.sizes = len(train), len(narrow_test), len(self.others.dataset), len(self.names)  # type: ignore[arg-type]

    def model(self, method: str) -> OpenCLIPDualEncoder:
        """Return the model before fine-tuning, with the loss of ``method``."""
        model = OpenCLIPDualEncoder(
            "emoji-clip",
            loss=LOSSES[method](),
            learning_rate=self.args.finetune_learning_rate,
            warmup_steps=0,
            augmentation={"scale": (0.8, 1.0)},  # as the example's
        )
        model.load_state_dict(self.weights, strict=False)  # a triplet loss has no scale
        return model

    def trainer(self, callbacks: Sequence[L.Callback] = ()) -> L.Trainer:
        """Return a quiet Trainer."""
        return L.Trainer(
            max_epochs=self.finetune_epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            callbacks=list(callbacks),
        )

    def measure(self, model: OpenCLIPDualEncoder) -> tuple[float, float, float]:
        """Return rsum on the narrow domain; top-1 and mean per class on the others."""
        rsum = self.trainer().test(model, datamodule=self.data, verbose=False)[0]["test/rsum"]
        accuracy = zero_shot_accuracy(model, self.others, self.names, templates=["{}"])
        return float(rsum), accuracy["top1"], accuracy["mean_per_class"]

    def run(self) -> Measured:
        """Fine-tune with every method, and measure."""
        measured: Measured = {("before", 0.0): self.measure(self.model("InfoNCE"))}
        for method in LOSSES:
            L.seed_everything(self.seed, verbose=False)
            start, model = time.perf_counter(), self.model(method)
            before = copy.deepcopy(model.state_dict())
            mining = OfflineHardNegativeMining(
                texts_per_image=30, images_per_text=6, relative_margin=0.05, inject="embeddings"
            )
            self.trainer([mining] * (method == "AOQ")).fit(model, datamodule=self.data)
            after = copy.deepcopy(model.state_dict())
            for share in SHARES:
                model.load_state_dict(interpolate_weights(before, after, share))
                measured[method, share] = self.measure(model)
            rsum, top1, _ = measured[method, 1.0]
            seconds = time.perf_counter() - start
            print(f"seed {self.seed} {method}: rsum {rsum:.1f}, zero-shot {top1:.1f} %, {seconds:.0f} s", flush=True)
        return measured


def main() -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8, help="from scratch (8)")
    parser.add_argument("--finetune-epochs", type=int, default=6, help="on the narrow domain (6)")
    parser.add_argument("--out", type=Path, default=Path("runs/zero-shot-drift"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", ".*LeafSpec.*|.*does not have many workers.*|Experiment logs directory.*exists.*")
    warnings.filterwarnings("ignore", "The number of training batches.*|Total length of `list`.*")
    for name in ("lightning.pytorch", "lightning.fabric", ""):
        logging.getLogger(name).setLevel(logging.ERROR)
    example = load_example()
    open_clip.add_model_config(example.HERE / "models" / "emoji-clip.json")
    results = []
    for seed in args.seeds:
        bench = Bench(example, args, seed)
        train, test, others, classes = bench.sizes
        print(f"{train} narrow emoji to train on, {test} to test; {others} others in {classes} classes", flush=True)
        results.append(bench.run())
    print(f"\n{'fine-tuned with':17}{'share':>6}{'narrow rsum':>16}{'zero-shot top-1':>18}{'mean per class':>17}")
    for method, share in results[0]:
        columns = zip(*(result[method, share] for result in results), strict=True)
        cells = [(statistics.mean(column), statistics.stdev(column) if len(column) > 1 else 0.0) for column in columns]
        (rsum, rsum_std), (top1, top1_std), (mean, mean_std) = cells
        print(
            f"{method:17}{share:6.2f}{rsum:9.1f} ± {rsum_std:4.1f}{top1:11.1f} ± {top1_std:4.1f}{mean:10.1f} ± {mean_std:4.1f}"
        )
    print("share: of the fine-tuned weights; mean and standard deviation over the seeds")


if __name__ == "__main__":
    main()
