"""How fast mining encodes on a GPU, beside plain inference of the same model on the same loader's batches.

Pictures of noise that are there already as tensors, so that the loader can keep up; ViT-B-32, bf16-mixed. Plain inference is a
loop over the loader with non-blocking copies and autocast, which keeps nothing but the embeddings. The ways take turns.

    python benchmarks/mining_cuda.py
    python benchmarks/mining_cuda.py --device cpu --quick    # see that it runs
"""

import argparse
import logging
import statistics
import warnings
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from timing import Report, seconds_of
from torch.utils.data import DataLoader

from lightning_itm import ImageTextDataset, InfoNCELoss, OpenCLIPDualEncoder
from lightning_itm.data import EvaluationItems, collate_pairs
from lightning_itm.mining import encode_pairs


def make_pairs(model: OpenCLIPDualEncoder, number: int) -> ImageTextDataset:
    """Make pairs of one picture, which costs nothing to load: bytes that are turned into float32 as a transform would."""
    size, context = model.model.visual.image_size[0], model.model.context_length
    picture, tokens = torch.randn(3, size, size), torch.randint(1, 1000, (context,))
    return ImageTextDataset(
        [np.zeros((1, 1, 3), dtype=np.uint8)] * number,
        [f"text {place}" for place in range(number)],
        transform=lambda _: picture,
        eval_transform=lambda _: picture,
        tokenizer=lambda texts: tokens.expand(len(texts), -1),
    )


def plainly(model: Any, pairs: ImageTextDataset, number: int, args: argparse.Namespace) -> torch.Tensor:
    """Encode images, then texts, and keep the embeddings."""
    embeddings = []
    kinds: tuple[Literal["image", "text"], ...] = ("image", "text")
    for kind in kinds:
        encode = getattr(model, f"encode_{kind}")
        loader: DataLoader[Any] = DataLoader(
            EvaluationItems(pairs, kind, number),
            args.batch_size,
            sampler=range(number),
            num_workers=args.num_workers,
            collate_fn=collate_pairs,
            pin_memory=args.device == "cuda",
        )
        with torch.inference_mode(), torch.autocast(args.device, dtype=torch.bfloat16):
            embeddings += [encode(batch[kind].to(args.device, non_blocking=True)).float() for batch in loader]
    return torch.cat(embeddings)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--pairs", type=int, default=40_000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--num-workers", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a few pairs: see that it runs")
    parser.add_argument("--out", help="a file that the table is written to as well")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", ""):
        logging.getLogger(name).setLevel(logging.ERROR)
    if args.quick:
        args.pairs, args.batch_size, args.num_workers, args.runs = 20, 8, 0, 1
    trainer = L.Trainer(
        accelerator="gpu" if args.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    model = OpenCLIPDualEncoder(args.model, loss=InfoNCELoss()).to(args.device).eval()
    pairs, options = make_pairs(model, args.pairs), {"batch_size": args.batch_size, "num_workers": args.num_workers}
    ways = {
        "plain inference": lambda: plainly(model, pairs, args.pairs, args),
        "mining's encoding": lambda: encode_pairs(trainer, model, pairs, args.pairs, **options),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.runs + 1):
        for name, way in ways.items():
            taken = seconds_of(way, args.device)
            if turn > 0:  # the first one warms up
                seconds[name].append(taken)
    report = Report(args.device, args.out, ("encoding", 24), ("s", 9), ("pairs/s", 10), ("throughput", 12))
    for name, times in seconds.items():
        share = statistics.median(a / b for a, b in zip(seconds["plain inference"], times, strict=True))
        report.row(name, statistics.median(times), args.pairs / statistics.median(times), share)
    report.close(f"{args.model}, {args.pairs} pairs, batch {args.batch_size}, {args.num_workers} workers")


if __name__ == "__main__":
    main()
