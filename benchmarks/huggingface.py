"""Measure the memory that a Hugging Face data set takes before the first batch, beside that of its file alone.

A set of PNGs within an Arrow file is written, opened, and read by ``ImageTextDataset.from_huggingface``. Peaks are those of
the resident set of the process, with the pages of the mapped file that were touched.

    python benchmarks/huggingface.py --images 2000
"""

import argparse
import io
import tempfile
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from lightning_itm import ImageTextDataset
from lightning_itm.data import collate_pairs


def peak_megabytes() -> float:
    """Return the most memory that this process held so far. Linux only."""
    # Not `ru_maxrss`, which a process takes over from the one that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def write(folder: str, num_images: int, side: int) -> None:
    """Write a set of PNGs of noise, which do not compress."""

    def rows() -> object:
        random = np.random.default_rng(0)
        for number in range(num_images):
            file = io.BytesIO()
            Image.fromarray(random.integers(256, size=(side, side, 3), dtype=np.uint8)).save(
                file, "PNG", compress_level=0
            )
            yield {
                "image": {"bytes": file.getvalue(), "path": None},
                "sentences": [f"picture {number}", f"noise {number}"],
            }

    features = datasets.Features({"image": datasets.Image(), "sentences": [datasets.Value("string")]})
    datasets.Dataset.from_generator(rows, features=features, cache_dir=f"{folder}-cache").save_to_disk(folder)


def measure(folder: str) -> list[float]:
    """Return the peaks: after the file is opened, after the set is made, and after the first batch."""
    dataset = datasets.load_from_disk(folder)
    assert len(dataset) == len(list(dataset.select_columns("sentences")))
    peaks = [peak_megabytes()]
    pairs = ImageTextDataset.from_huggingface(dataset)
    loader = DataLoader(pairs, 64, shuffle=True, collate_fn=collate_pairs)
    peaks.append(peak_megabytes())
    next(iter(loader))
    return [*peaks, peak_megabytes()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=256, help="pixels")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/set"
        write(path, options.images, options.side)
        size = sum(file.stat().st_size for file in Path(path).iterdir()) / 1e6
        with get_context("spawn").Pool(1) as pool:  # a process that has not written the file
            opened, made, read = pool.apply(measure, (path,))
    print(f"{options.images} images, a file of {size:.0f} MB")
    print(
        f"peak memory: {opened:.0f} MB with the file open, {made:.0f} MB before and {read:.0f} MB after the first batch"
    )


if __name__ == "__main__":
    main()
