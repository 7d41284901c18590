"""Which negatives pay, and for whom? InfoNCE, tuned first, against everything else: on icons, emoji and photographs.

Each run prints one line and adds it to a file. So runs may be spread over processes and evenings, and a stopped table goes on
where it was. The table has rsum on the test set at the end of the run, its difference to InfoNCE for the same seed with the
95 % interval, rsum in the epoch that is best on the validation set, R@1, rsum with all pairs of the set as candidates, and the
time of a step and of the whole run beside InfoNCE's. For equal time, ``--methods "InfoNCE, 1.5 x"`` is InfoNCE for one and a
half times as many epochs.

    python benchmarks/negatives.py --setting icons --folder ICONS --methods InfoNCE "batches of 16" --seeds 0 1 2
    python benchmarks/negatives.py --setting icons --table          # the table of what was run so far
    python benchmarks/negatives.py --setting icons --tune           # InfoNCE alone, at several rates, judged on val
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from negatives_settings import METHODS, SETTINGS, Method, Setting, methods_of
from torch.utils.data import DataLoader

from lightning_itm import ImageTextDataset, ImageTextRetrieval
from lightning_itm.data import EvaluationItems, collate_pairs
from lightning_itm.data.evaluation_items import KINDS
from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.functional import recall_at_k, retrieval_rank
from lightning_itm.functional.similarity import unit_norm

T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
"""Student's t for a 95 % interval, by degrees of freedom."""


class Evaluate(Callback):
    """Compute rsum on both held-out sets after each epoch, and measure the time of steps and of evaluation."""

    def __init__(self) -> None:
        self.val: list[dict[str, float]] = []
        self.test: list[dict[str, float]] = []
        self.steps: list[float] = []
        self.start, self.evaluation = 0.0, 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop it."""
        self.steps.append(time.perf_counter() - self.start)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        start = time.perf_counter()
        self.val.append(retrieve(pl_module, data.val_dataset))
        self.test.append(retrieve(pl_module, data.test_dataset))
        pl_module.train()
        self.evaluation += time.perf_counter() - start


@torch.no_grad()
def embed_set(model: Any, pairs: ImageTextDataset) -> EmbeddingPairs:
    """Encode each image and each text of a set once."""
    model.eval()
    rows = {}
    for kind in KINDS:
        loader = DataLoader(EvaluationItems(pairs, kind), 250, collate_fn=collate_pairs)
        rows[kind] = torch.cat([unit_norm(getattr(model, f"encode_{kind}")(batch[kind])).float() for batch in loader])
    owner = pairs.text_image_id
    return EmbeddingPairs(rows["image"][owner], rows["text"], owner, torch.arange(len(owner)))


def retrieve(model: Any, pairs: Any) -> dict[str, float]:
    """Return rsum and R@1 in both directions."""
    metric = ImageTextRetrieval()
    metric.update(embed_set(model, pairs))
    values = metric.compute()
    return {name: float(values[name]) for name in ("rsum", "i2t_r1", "t2i_r1")}


def gallery_rsum(model: Any, sets: list[Any]) -> float:
    """Return rsum of the last set, with the pairs of all sets as candidates."""
    parts, offset_image, offset_text = [], 0, 0
    for pairs in sets:
        found = embed_set(model, pairs)
        ids = found.image_id + offset_image, found.text_id + offset_text
        parts.append(EmbeddingPairs(found.image_embeddings, found.text_embeddings, *ids))
        offset_image, offset_text = offset_image + len(pairs.images), offset_text + len(pairs.texts)
    everything, test = parts[0], parts[-1]
    for part in parts[1:]:
        everything = everything + part
    total = 0.0
    texts = everything.text_embeddings, everything.image_id
    for anchors, (keys, key_id) in ((test.image_embeddings, texts), (test.text_embeddings, first_of_each(everything))):
        rank = retrieval_rank(anchors, keys, query_id=test.image_id, key_id=key_id)
        total += sum(float(recall_at_k(rank, k)) for k in (1, 5, 10))
    return total


def first_of_each(pairs: EmbeddingPairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each image once."""
    ids, inverse = pairs.image_id.unique(return_inverse=True)
    first = torch.full((len(ids),), len(pairs)).scatter_reduce(0, inverse, torch.arange(len(pairs)), "amin")
    return pairs.image_embeddings[first], ids


def run(setting: Setting, name: str, method: Method, seed: int, folder: Path | None, **changes: Any) -> dict[str, Any]:
    """Train with one method from one seed, and return what is to be kept."""
    data = setting.data(folder, seed, **changes)
    start = setting.start(folder, seed)
    L.seed_everything(seed, verbose=False)
    rate = changes.get("rate", method.rate or setting.rate)
    model = setting.model(method.loss(), rate, folder)
    if start is not None:
        model.load_state_dict(start, strict=False)
    watch = Evaluate()
    epochs = round(changes.get("epochs", setting.epochs) * method.epochs)
    began = time.perf_counter()
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        gradient_clip_val=setting.clip,
        limit_train_batches=setting.fraction,
        callbacks=[*method.callbacks(seed), watch],
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    seconds = time.perf_counter() - began - watch.evaluation  # of training and mining
    best = max(range(epochs), key=lambda epoch: watch.val[epoch]["rsum"])
    return {
        "setting": setting.name,
        "method": name,
        "seed": seed,
        "rate": rate,
        "epochs": epochs,
        "val": watch.val[-1]["rsum"],
        "rsum": watch.test[-1]["rsum"],
        "r1": (watch.test[-1]["i2t_r1"] + watch.test[-1]["t2i_r1"]) / 2,
        "best": watch.test[best]["rsum"],
        "gallery": gallery_rsum(model, [data.train_dataset, data.val_dataset, data.test_dataset]),
        "step": statistics.median(watch.steps),
        "seconds": seconds,
        **changes,
    }


def interval(differences: list[float]) -> str:
    """Return the mean of paired differences with the half width of its 95 % interval."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+7.1f}        "
    half = T_95[len(differences) - 1] * statistics.stdev(differences) / len(differences) ** 0.5
    return f"{mean:+7.1f} ± {half:5.1f}"


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print one line per method: means over the seeds, and paired differences to InfoNCE."""
    base = {row["seed"]: row for row in rows if row["method"] == "InfoNCE"}
    print(
        f"\n{'method':28}{'seeds':>6}{'rsum':>16}{'to InfoNCE':>16}{'best by val':>12}{'R@1':>7}{'gallery':>9}{'step':>7}"
    )
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        rsum = [row["rsum"] for row in own]
        spread = statistics.stdev(rsum) if len(rsum) > 1 else 0.0
        paired = [row["rsum"] - base[row["seed"]]["rsum"] for row in own if row["seed"] in base]
        means = {key: statistics.mean(row[key] for row in own) for key in ("best", "r1", "gallery")}
        pairs = [(row, base[row["seed"]]) for row in own if row["seed"] in base]
        costs = [
            statistics.median(row[key] / one[key] for row, one in pairs) if pairs else 0.0
            for key in ("step", "seconds")
        ]
        print(
            f"{name:28}{len(own):6}{statistics.mean(rsum):9.1f} ± {spread:4.1f}{interval(paired) if paired else '':>16}"
            f"{means['best']:12.1f}{means['r1']:7.1f}{means['gallery']:9.1f}{costs[0]:6.2f} x{costs[1]:6.2f} x"
        )


def main() -> None:
    """Run what was asked for and is not in the file yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, required=True)
    parser.add_argument("--methods", nargs="+", default=None, help=f"of {list(METHODS)}, or 'InfoNCE, 1.5 x'")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, help="where the set is: icons.npz, or the photographs and their JSON")
    parser.add_argument("--out", type=Path, default=Path("runs/negatives.jsonl"))
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    parser.add_argument("--tune", type=float, nargs="*", help="InfoNCE at these rates, or at those of the setting")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric", ""):
        logging.getLogger(logger).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    setting = SETTINGS[args.setting]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plan: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in args.methods or setting.methods]
    if args.tune is not None:
        plan = [("InfoNCE", {"rate": rate}) for rate in args.tune or setting.rates]
    for seed in [] if args.table else args.seeds:
        for name, changes in plan:
            rows = read(args.out)
            key = {"setting": setting.name, "method": name, "seed": seed, "is_tuning": args.tune is not None, **changes}
            if any(key.items() <= row.items() for row in rows):
                continue
            row = run(setting, name, methods_of(name), seed, args.folder, **changes) | key
            with open(args.out, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    rows = [row for row in read(args.out) if row["setting"] == setting.name]
    if args.tune is not None:
        for row in sorted((row for row in rows if row["is_tuning"]), key=lambda row: (row["rate"], row["seed"])):
            print(f"rate {row['rate']:8.1e}  seed {row['seed']}  val {row['val']:6.1f}  test {row['rsum']:6.1f}")
    else:
        print_table([row for row in rows if not row["is_tuning"]])


def read(path: Path) -> list[dict[str, Any]]:
    """Read what was run so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
