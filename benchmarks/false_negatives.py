"""How often is a drawn negative a match in truth, and what does that do to retrieval?

Emoji of people come in several skin tones. With the tone left out of the name, several images have one caption: known
duplicates under different image ids. A negative is *false* where its caption is that of the anchor.

For each seed: a model is trained with InfoNCE, then fine-tuned with a triplet loss and a memory bank under each rule. The
first table has the share of false negatives that each rule draws from the same banks, those of the run with the published
rule from its third epoch on; the second the share in the rule's own run, and rsum on held-out emoji, where every image or
text of the right caption counts as right. Split, epochs, rules and rates were set before these runs were looked at.

With ``--posteriors``, a table of the duplicates that each posterior recognises at batch sizes of 32 to 4,096, from embeddings
of a model that is trained first: on emoji, or on the icons of a folder (see icons.py). *Recall* is the share of known
duplicates that are taken for likely matches, *lost* the share of all other candidates. Without it, and with icons, a model
is fine-tuned with InfoNCE alone, with a bank, and with a bank that drops likely matches.

    python benchmarks/false_negatives.py --seeds 0 1 2     # about nine minutes per seed on two cores
    python benchmarks/false_negatives.py --posteriors --data emoji
    python benchmarks/false_negatives.py --posteriors --data FOLDER_WITH_ICONS
"""

import argparse
import copy
import logging
import math
import re
import statistics
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import open_clip
import torch
from emoji_example import load_example
from icons import embed_all
from icons_elimination import compare_on_icons, posteriors_on_icons
from posteriors import print_posteriors
from torch import Tensor

from lightning_itm import (
    FalseNegativeElimination,
    FalseNegativeSampler,
    ImageTextDataModule,
    ImageTextDataset,
    InfoNCELoss,
    OpenCLIPDualEncoder,
    TripletLoss,
)
from lightning_itm.functional import DrawnNegative, recall_at_k, retrieval_rank
from lightning_itm.losses import DirectionCost
from lightning_itm.memory_bank import MemoryCandidates, MemoryDirection

HARDEST, OF_BATCH, PUBLISHED = "hardest of the bank", "hardest of the batch", "exp (published)"
RULES: dict[str, dict[str, Any]] = {
    "no elimination": {"min_count": 10**9},
    PUBLISHED: {"posterior": "published", "weighting": "exp"},
    "exp": {"weighting": "exp"},
    "complement, published": {"posterior": "published", "weighting": "complement"},
    "complement": {"weighting": "complement"},
    "drop, published": {"posterior": "published", "weighting": "drop"},
    "drop": {"weighting": "drop"},
}
SKIN_TONE = re.compile(r",? (and )?(medium-light|medium-dark|medium|light|dark) skin tone")


class Hardest(FalseNegativeSampler):
    """Take the hardest negative of the bank."""

    @torch.no_grad()
    def draw(self, direction: MemoryDirection, *, margin: float | None) -> tuple[DrawnNegative, dict[str, Tensor]]:
        """Draw the most similar candidate of another image."""
        scores = direction.scores()
        hardest = scores.similarity.masked_fill(~scores.negative_mask, -torch.inf).max(dim=1)
        return DrawnNegative(hardest.indices, hardest.values > -torch.inf, torch.zeros_like(hardest.indices) > 0), {}


class CountedTripletLoss(TripletLoss):
    """Count the false negatives that are drawn, and those that other rules would draw from the same bank."""

    def __init__(self, caption: Tensor, others: dict[str, FalseNegativeSampler]) -> None:
        super().__init__(memory="instead")
        self.caption, self.others = caption, others
        self.counts: dict[str, list[float]] = defaultdict(list)

    def memory_cost(self, batch: DirectionCost, direction: MemoryDirection, memory: MemoryCandidates) -> DirectionCost:
        """Draw as always; and count."""
        rule = memory.sampler
        if isinstance(rule, FalseNegativeSampler) and rule.epoch >= 2:
            for name, sampler in {"itself": rule, **self.others}.items():
                sampler.statistics, sampler.epoch, sampler.step = rule.statistics, rule.epoch, rule.step
                drawn, _ = sampler.draw(direction, margin=self.margin)
                false = self.caption[direction.candidate_id[drawn.candidate_index]] == self.caption[direction.anchor_id]
                self.counts[name].append(float(false.float().mean()))
        return super().memory_cost(batch, direction, memory)

    def share(self, name: str) -> float:
        """Return the share of draws that were false, in percent."""
        return 100 * statistics.mean(self.counts[name]) if self.counts[name] else float("nan")


def caption_of(item: Any) -> str:
    """Leave the skin tone out of a name."""
    return SKIN_TONE.sub("", item.name)


def evaluate(model: OpenCLIPDualEncoder, pairs: ImageTextDataset, caption: Tensor) -> float:
    """Compute rsum, where everything of the right caption is right."""
    embedded = embed_all(model, pairs.evaluation())
    image, text = embedded.image_embeddings, embedded.text_embeddings
    first = torch.tensor(sorted({int(value): place for place, value in reversed(list(enumerate(caption)))}.values()))
    ranks = (
        retrieval_rank(image, text[first], query_id=caption, key_id=caption[first]),
        retrieval_rank(text[first], image, query_id=caption[first], key_id=caption),
    )
    return float(sum(recall_at_k(rank, k) for rank in ranks for k in (1, 5, 10)))


def posteriors_on_emoji(args: argparse.Namespace, example: Any) -> None:
    """Train with InfoNCE, and print which duplicates are recognised in its embeddings."""
    start: dict[str, Any] = {}
    fine_tune(args, example, "start", start, args.seeds[0])
    model = OpenCLIPDualEncoder("emoji-clip", loss=InfoNCELoss())
    model.load_state_dict(start)
    train = example.split()[0]
    names = [caption_of(item) for item in train]
    pairs = ImageTextDataset([item.image for item in train], names, equal_captions="keep", **model.transforms)
    number = {name: place for place, name in enumerate(sorted(set(names)))}
    print_posteriors(embed_all(model, pairs.evaluation()), torch.tensor([number[name] for name in names]))


def fine_tune(args: argparse.Namespace, example: Any, rule: str, start: dict[str, Any], seed: int) -> tuple[float, Any]:
    """Return rsum, and the loss with its counts."""
    L.seed_everything(seed, verbose=False)
    train, _, test = example.split()
    captions = sorted({caption_of(item) for item in (*train, *test)})
    ids = [torch.tensor([captions.index(caption_of(item)) for item in part]) for part in (train, test)]
    samplers = {name: FalseNegativeSampler(**options, seed=seed) for name, options in RULES.items()}
    others = {**samplers, HARDEST: Hardest(seed=seed)} if rule == PUBLISHED else {}
    loss = CountedTripletLoss(ids[0], others)
    model = OpenCLIPDualEncoder(
        "emoji-clip",
        loss=InfoNCELoss() if rule == "start" else loss,
        learning_rate=args.learning_rate if rule == "start" else args.finetune_learning_rate,
        warmup_steps=0,
        augmentation={"scale": (0.8, 1.0)},
    )
    if start:
        model.load_state_dict(start, strict=False)
    options: dict[str, Any] = {"equal_captions": "keep", **model.transforms}  # they are what is counted
    sets = [
        ImageTextDataset([item.image for item in part], [caption_of(item) for item in part], **options)
        for part in (train, test)
    ]
    callbacks: list[Any] = []
    if rule not in ("start", OF_BATCH):
        kind = Hardest if rule == HARDEST else FalseNegativeSampler
        sampler = kind(seed=seed, **RULES.get(rule, {}))
        callbacks.append(FalseNegativeElimination(args.queue_size, args.momentum, start_epoch=1, sampler=sampler))
    trainer = L.Trainer(
        max_epochs=args.epochs if rule == "start" else args.finetune_epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=ImageTextDataModule(sets[0], batch_size=128, num_workers=0, seed=seed))
    if rule == "start":
        start.update(copy.deepcopy(model.state_dict()))
    if callbacks and seed == args.seeds[0]:
        args.out.mkdir(parents=True, exist_ok=True)
        callbacks[0].plot().savefig(args.out / f"{rule.replace(' ', '-')}.png", dpi=110)
    return evaluate(model, sets[1], ids[1]), loss


def spread(values: list[float]) -> float:
    """Return the standard deviation, 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def print_table(title: str, rows: dict[str, list[list[float]]], names: list[str]) -> None:
    """Print mean and standard deviation over the seeds of each column."""
    print(f"\n{title:34}" + "".join(f"{name:>24}" for name in names))
    for rule, columns in rows.items():
        cells = [
            "" if math.isnan(values[0]) else f"{statistics.mean(values):8.2f} ± {spread(values):5.2f}"
            for values in columns
        ]
        print(f"{rule:34}" + "".join(f"{cell:>24}" for cell in cells), flush=True)


def main() -> None:
    """Run the seeds and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="emoji", help="emoji, or a folder with icons.npz (emoji)")
    parser.add_argument("--posteriors", action="store_true", help="a table of recognised duplicates per batch size")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8, help="of InfoNCE, before (8)")
    parser.add_argument("--finetune-epochs", type=int, default=6, help="with each rule (6)")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--finetune-learning-rate", type=float, default=2e-4)
    parser.add_argument("--queue-size", type=int, default=2048)
    parser.add_argument("--momentum", type=float, default=0.99)
    parser.add_argument("--out", type=Path, default=Path("runs/false-negatives"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", ""):
        logging.getLogger(name).setLevel(logging.ERROR)
    if args.data != "emoji":
        torch.set_num_threads(1)
        run = compare_on_icons if not args.posteriors else posteriors_on_icons
        run(Path(args.data), args.seeds)
        return
    example = load_example()
    open_clip.add_model_config(example.HERE / "models" / "emoji-clip.json")
    if args.posteriors:
        posteriors_on_emoji(args, example)
        return
    train = example.split()[0]
    known = Counter(caption_of(item) for item in train)
    print(
        f"{len(train)} emoji to train on, {sum(known[caption_of(item)] > 1 for item in train)} of them with duplicates"
    )
    same_bank: dict[str, list[float]] = defaultdict(list)
    own: dict[str, list[list[float]]] = {}
    for seed in args.seeds:
        start: dict[str, Any] = {}
        for rule in ("start", OF_BATCH, HARDEST, *RULES):
            rsum, loss = fine_tune(args, example, rule, start, seed)
            columns = own.setdefault(rule, [[], []])
            columns[0].append(rsum)
            columns[1].append(loss.share("itself"))
            print(f"seed {seed}, {rule}: rsum {rsum:.1f}, false {columns[1][-1]:.2f} %", flush=True)
            for name in loss.others:
                same_bank[name].append(loss.share(name))
    print_table("from the same banks", {rule: [values] for rule, values in same_bank.items()}, ["false negatives, %"])
    ratio = statistics.mean(same_bank[HARDEST]) / max(1e-9, statistics.mean(same_bank["drop"]))
    print(f"the hardest of the bank is false {ratio:.1f} times as often as a draw with 'drop'")
    print_table("each in its own run", own, ["rsum, duplicates right", "false negatives, %"])


if __name__ == "__main__":
    main()
