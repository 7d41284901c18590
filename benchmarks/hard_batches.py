"""What composing an epoch of hard batches costs: seconds and memory per million pairs, on one core.

The table is made up: neighbours of a pair lie near it on a line, in both directions, so that many pairs want the same ones.

    python benchmarks/hard_batches.py                       # one million pairs, about a minute
    python benchmarks/hard_batches.py --pairs 100000 1000000 2000000

With ``--folder``, what an epoch with ``encode="training"`` costs beside one without mining: both towers are fine-tuned on
Flickr8k (see flickr8k.py), some steps with and some without, in turn. An epoch reads as many pairs as there are photographs.

    python benchmarks/hard_batches.py --folder FOLDER       # about five minutes on one core
"""

import argparse
import logging
import resource
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from flickr8k import DIM, Towers, tower_data
from lightning.pytorch.callbacks import Callback

from lightning_itm import InfoNCELoss, OfflineHardNegativeMining
from lightning_itm.mining import compose_batches

REACH = 200


def neighbours(num_pairs: int, width: int) -> torch.Tensor:
    """Return a table of near pairs, int32 `(pairs, width)`, never the pair itself."""
    offset = torch.randint(1, REACH, (num_pairs, width), dtype=torch.int32)
    sign = torch.randint(0, 2, (num_pairs, width), dtype=torch.int32) * 2 - 1
    return (torch.arange(num_pairs, dtype=torch.int32)[:, None] + sign * offset) % num_pairs


class Clock(Callback):
    """Measure from one step's end to the next one's, so that callbacks and loading count."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Look at the clock."""
        self.ends.append(time.perf_counter())


class FillUp(Callback):
    """Give every pair an embedding at the start, so that the whole set is searched, as after some epochs."""

    def __init__(self, miner: OfflineHardNegativeMining) -> None:
        self.miner = miner

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fill."""
        mining = self.miner._mining
        assert mining is not None
        assert mining.training_embeddings is not None
        number = len(mining.pairs)
        rows = torch.nn.functional.normalize(torch.randn(2, number, DIM), dim=2)
        mining.training_embeddings.update(rows[0], rows[1], torch.arange(number))


def cost_of_training_embeddings(folder: Path, steps: int, runs: int) -> None:
    """Fine-tune both towers with and without, in turn, and print the ratio of two epochs."""
    model = Towers(InfoNCELoss(), learning_rate=1e-4, weight_decay=0.05)
    data = tower_data(folder, 0)
    num_steps = len(data.train_dataset.images) // data.batch_size  # type: ignore[union-attr]
    medians: dict[str, list[float]] = {"without": [], "with": []}
    mining: list[float] = []
    for _ in range(runs):
        for name in medians:
            clock = Clock()
            options: dict[str, Any] = {"texts_per_image": 60, "images_per_text": 60, "encode": "training"}
            miner = OfflineHardNegativeMining(inject="batches", **options)
            miners = [miner, FillUp(miner)] if name == "with" else []
            trainer = L.Trainer(
                max_epochs=2,
                limit_train_batches=steps,
                limit_val_batches=0,
                accelerator="cpu",
                callbacks=[*miners, clock],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(model, datamodule=data)
            gaps = [
                later - earlier for earlier, later in zip(clock.ends[: steps - 1], clock.ends[1:steps], strict=True)
            ]
            medians[name].append(statistics.median(gaps))
            if miners:
                mining.append(sum(float(value) for key, value in trainer.callback_metrics.items() if "seconds" in key))
            print(f"{name:8}{medians[name][-1]:8.3f} s per step", flush=True)
    between = statistics.median(mining)
    ratio = statistics.median(one / other for one, other in zip(medians["with"], medians["without"], strict=True))
    epoch = num_steps * statistics.median(medians["without"])
    print(f"a step with is {ratio:.3f} x one without; encoding, search and composing take {between:.1f} s per epoch")
    over_photographs, over_captions = ratio + between / epoch, ratio + between / epoch / 5
    print(f"an epoch of {num_steps} steps: {over_photographs:.3f} x, one over all captions: {over_captions:.3f} x")


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000_000], help="sizes of the set (1,000,000)")
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--width", type=int, default=60, help="texts per image and images per text (60)")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="of Flickr8k: measure an epoch instead")
    parser.add_argument("--steps", type=int, default=30, help="of each run with --folder (30)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.folder is not None:
        warnings.filterwarnings("ignore")
        for name in ("lightning.pytorch", "lightning.fabric", ""):
            logging.getLogger(name).setLevel(logging.ERROR)
        cost_of_training_embeddings(args.folder, args.steps, args.runs)
        return
    torch.manual_seed(0)
    print(f"{'pairs':>12}{'group':>7}{'seconds':>10}{'per million':>13}{'grouped':>10}{'peak memory':>13}")
    for num_pairs in args.pairs:
        texts, images = neighbours(num_pairs, args.width), neighbours(num_pairs, args.width)
        for group_size in args.group_sizes:
            options = {"group_size": group_size, "batch_size": args.batch_size}
            seconds = []
            for epoch in range(args.runs):
                start = time.perf_counter()
                composed = compose_batches(texts, images, torch.arange(num_pairs), **options, epoch=epoch)
                seconds.append(time.perf_counter() - start)
            median, peak = statistics.median(seconds), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(
                f"{num_pairs:12,}{group_size:7}{median:10.1f}{median / num_pairs * 1e6:13.1f}"
                f"{composed.grouped_fraction():10.3f}{peak:10.1f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
