"""What a set of a million pairs costs before any model runs: time and memory per million pairs, at several sizes.

One text per image, 32 mined texts and 8 mined images per pair. Each size runs in a process of its own, on one thread. Time
is in seconds of that processor. Where the figures of the sizes are level, the cost is linear. Memory is what stays in the
process afterwards (resident set). The last column is the peak, with PyTorch itself and the made-up table.

    python benchmarks/million.py                                    # a quarter, a half and one million pairs
    python benchmarks/million.py --pairs 10000000                   # the same of ten million
    python benchmarks/million.py --sizes 100000 200000 400000

`pairs` reads a manifest of JSON lines and makes the `ImageTextDataset`. `table` makes and publishes a `NegativeTable`. `order`
composes an epoch of hard batches, groups of 4 in batches of 512. `draws` draws from the table once for each pair.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from data_path import DRAWS, resident, write_manifest
from hard_batches import neighbours

from lightning_itm import HardNegativeDataset, ImageTextDataset
from lightning_itm.mining import NegativeTable, compose_batches

TEXTS_PER_IMAGE, IMAGES_PER_TEXT = 32, 8
MILLION = 1_000_000
STAGES = ("pairs", "table", "order", "draws")


def held() -> int:
    """Return how much memory this process holds now, in bytes."""
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("Expected a line VmRSS in /proc/self/status. This script needs Linux.")


class Costs:
    """Collect seconds and bytes of each stage."""

    def __init__(self) -> None:
        self.of_stage: dict[str, tuple[float, float]] = {}

    def measure(self, stage: str, function: Callable[[], Any]) -> Any:
        """Run a stage, and return what it made. That stays in memory until it is measured."""
        before, start = held(), time.process_time()
        made = function()
        self.of_stage[stage] = time.process_time() - start, held() - before
        return made


def measure(num_pairs: int, folder: Path) -> dict[str, Any]:
    """Measure all stages once, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path, costs = folder / "manifest.jsonl", Costs()
    write_manifest(path, num_pairs, texts_per_image=1)
    (folder / f"{0:012d}.jpg").touch()  # the first is looked for
    pairs = costs.measure("pairs", lambda: ImageTextDataset.from_jsonl(path, folder, max_unreadable=1.0))
    texts, images = neighbours(num_pairs, TEXTS_PER_IMAGE), neighbours(num_pairs, IMAGES_PER_TEXT)

    def publish() -> NegativeTable:
        places = {"texts_per_image": TEXTS_PER_IMAGE, "images_per_text": IMAGES_PER_TEXT}
        table = NegativeTable(num_pairs, num_pairs, **places)
        table.publish(texts, images)
        return table

    table = costs.measure("table", publish)
    of_epoch = {"group_size": 4, "batch_size": 512, "caption_id": pairs.caption_id}
    composed = costs.measure(
        "order", lambda: compose_batches(table.texts, table.images, pairs.text_image_id, **of_epoch)
    )
    mined, some = HardNegativeDataset(pairs, table), composed.order[:DRAWS].tolist()
    costs.measure("draws", lambda: [mined.draw(table.texts[i], table.images[i]) for i in some])
    seconds, memory = costs.of_stage["draws"]
    costs.of_stage["draws"] = seconds * num_pairs / len(some), memory
    return {"stages": costs.of_stage, "peak": resident(), "grouped": composed.grouped_fraction()}


def in_a_process(num_pairs: int) -> dict[str, Any]:
    """Measure one size in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--measure", str(num_pairs), folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result


def main() -> None:
    """Measure each size, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=MILLION, help="the largest of three sizes (1,000,000)")
    parser.add_argument("--sizes", type=int, nargs="+", help="all sizes, instead of --pairs")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(int(args.measure[0]), Path(args.measure[1]))))
        return
    print("Seconds per million pairs, and MB per million pairs. One thread.")
    print(f"{'pairs':>12}" + "".join(f"{name:>20}" for name in STAGES) + f"{'grouped':>10}{'peak':>10}")
    for size in args.sizes or [args.pairs // 4, args.pairs // 2, args.pairs]:
        result = in_a_process(size)
        cells = []
        for name in STAGES:
            seconds, memory = result["stages"][name]
            cells.append(f"{f'{seconds / size * MILLION:.1f} s, {memory / size:.0f} MB':>20}")  # bytes per pair are MB
        print(
            f"{size:12,}" + "".join(cells) + f"{result['grouped']:10.3f}{result['peak'] / 1e9:7.1f} GB",
            flush=True,
        )


if __name__ == "__main__":
    main()
