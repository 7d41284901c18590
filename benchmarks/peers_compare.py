"""What the parts of peers.py share: ways that run in turn, and their ratio to the peer's."""

import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor
from torch.nn.functional import normalize

Way = Callable[[], object]
DIM = 512


def compare(title: str, peer: tuple[str, Way], others: dict[str, Way], runs: int, *, per_run: int = 0) -> None:
    """Run all ways in turn, and print the ratio of each to the peer's.

    Args:
        title: What is measured.
        peer: The name of the way that the others are compared with, and the way.
        others: Our ways, and further peers.
        runs: How often each way runs, after a first time that does not count.
        per_run: Number of items that each run reads. With it, items per second are printed, too.
    """
    ways = {peer[0]: peer[1], **others}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()  # once, so that nothing is set up below
    for _ in range(runs):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name].append(time.process_time() - start)
    print(f"\n{title}, median of {runs} runs")
    for name, own in seconds.items():
        ratios = [one / other for one, other in zip(own, seconds[peer[0]], strict=True)]
        print(f"  {name:48}{1000 * statistics.median(own):10.1f} ms", end="")
        print(f"{per_run / statistics.median(own):10.0f} per second" if per_run else "", end="")
        spread = f"{statistics.median(ratios):8.2f} x   ({min(ratios):.2f} to {max(ratios):.2f})"
        print("" if name == peer[0] else spread, flush=True)


def print_versions(*packages: str) -> None:
    """Print which versions are compared."""
    print("\n" + ", ".join(f"{package} {version(package)}" for package in ("torch", *packages)))


def unit(rows: int) -> Tensor:
    """Return random embeddings."""
    return normalize(torch.randn(rows, DIM), dim=1)
