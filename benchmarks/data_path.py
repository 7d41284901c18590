"""What the data path costs as sets grow: reading a manifest, the table of negatives, the order of an epoch; and shards.

No images are read: the pictures of the manifests do not exist, apart from those of the shards, which are one real picture over
and over. Peak memory is the resident set of a process of its own, with PyTorch itself and the table's file.

    python benchmarks/data_path.py
    python benchmarks/data_path.py --images 50000 100000 200000 --shard-images 2000 4000 8000
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from skimage import data as pictures
from torch.utils.data import DataLoader

from lightning_itm import HardNegativeDataset, ImageTextDataset, ShardDataset, ShardStream, write_shards
from lightning_itm.data import EpochSampler, SeededDataset, collate_pairs
from lightning_itm.data.shards import StreamedBatches, StreamLoader
from lightning_itm.mining import NegativeTable

TEXTS_PER_IMAGE = 5
DRAWS = 20_000


def write_manifest(path: Path, num_images: int, texts_per_image: int = TEXTS_PER_IMAGE) -> None:
    """Write a JSONL of synthetic captions of the length of COCO's, one image per line."""
    with open(path, "w") as file:
        for image in range(num_images):
            texts = [f"A caption of some ten words or so, number {k} of image {image}." for k in range(texts_per_image)]
            file.write(json.dumps({"image": f"{image:012d}.jpg", "text": texts}) + "\n")


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call takes, and what it returns."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def measure_manifest(num_images: int, folder: Path) -> dict[str, float]:
    """Measure each part once, in this process."""
    torch.set_num_threads(1)
    path = folder / "manifest.jsonl"
    write_manifest(path, num_images)
    (folder / f"{0:012d}.jpg").touch()  # the first is looked for
    indexing, pairs = timed(lambda: ImageTextDataset.from_jsonl(path, folder, max_unreadable=1.0))

    def fill() -> HardNegativeDataset:
        table = NegativeTable(num_images, len(pairs), texts_per_image=300, images_per_text=60)
        table.texts.random_(len(pairs))
        table.images.random_(num_images)
        return HardNegativeDataset(pairs, table)

    filling, mined = timed(fill)
    seeded = SeededDataset(mined)
    sampler = EpochSampler(seeded, 256, lambda: (0, 0))
    sampling, order = timed(lambda: list(sampler))
    some = order[: min(DRAWS, len(order))]
    drawing, _ = timed(lambda: [mined.draw(mined.table.texts[i // 5], mined.table.images[i]) for i in some])
    return {
        "index": indexing,
        "table": filling,
        "order": sampling,
        "draws of an epoch": drawing / len(some) * len(pairs),
        "peak GB": resident() / 1e9,
    }


def measure_shards(num_images: int, folder: Path) -> dict[str, float]:
    """Index shards of one picture over and over, and read an epoch of them, by number and as a stream, without transforms."""
    torch.set_num_threads(1)
    picture = folder / "picture.jpg"
    cat: Any = pictures.chelsea
    Image.fromarray(cat()).resize((64, 64)).save(picture)
    data = picture.read_bytes()
    texts = [[f"caption {k} of image {i}" for k in range(TEXTS_PER_IMAGE)] for i in range(num_images)]
    write_shards(ImageTextDataset([data] * num_images, texts), folder / "shards", images_per_shard=1000)
    for index in (folder / "shards").glob("*.index"):
        index.unlink()
    indexing, pairs = timed(lambda: ShardDataset(folder / "shards", tokenizer=lambda _: torch.zeros(1, 4)))
    loader = DataLoader(SeededDataset(pairs), 256, shuffle=True, collate_fn=collate_pairs)
    by_number, _ = timed(lambda: sum(len(batch["text_id"]) for batch in loader))
    batches = StreamedBatches(ShardStream(pairs), 256, drop_last=False, rank=0, world_size=1, seed=0)
    streaming, count = timed(lambda: sum(len(batch["text_id"]) for batch in StreamLoader(batches, lambda: (0, 0))))
    if count != len(pairs):
        raise RuntimeError(f"Expected {len(pairs)} pairs in an epoch, got {count}.")
    return {"index": indexing, "epoch by number": by_number, "epoch as a stream": streaming}


def resident() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_processes(kind: str, num_images: int, repeats: int) -> dict[str, float]:
    """Measure in processes of their own, and return the medians."""
    results = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--measure", kind, str(num_images), folder]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    return {name: statistics.median(result[name] for result in results) for name in results[0]}


def print_table(kind: str, sizes: list[int], repeats: int) -> None:
    """Print seconds, and microseconds a pair, which stay the same where the cost is linear."""
    for number, size in enumerate(sizes):
        result = in_processes(kind, size, repeats)
        pairs = size * TEXTS_PER_IMAGE
        if number == 0:
            print(f"\n{'images':>9}{'pairs':>10}" + "".join(f"{name:>26}" for name in result))
        cells = [
            f"{value:>26.2f}" if "GB" in name else f"{f'{value:.2f} s, {1e6 * value / pairs:.1f} µs a pair':>26}"
            for name, value in result.items()
        ]
        print(f"{size:>9}{pairs:>10}" + "".join(cells), flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[50_000, 100_000, 200_000])
    parser.add_argument("--shard-images", type=int, nargs="+", default=[1_000, 2_000, 4_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        kind, size, folder = args.measure
        function = {"manifest": measure_manifest, "shards": measure_shards}[kind]
        print(json.dumps(function(int(size), Path(folder))))
        return
    print("One thread. Medians of", args.repeats)
    print_table("manifest", args.images, args.repeats)
    print_table("shards", args.shard_images, args.repeats)


if __name__ == "__main__":
    main()
