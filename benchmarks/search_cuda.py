"""Exact top-k of a whole training set on a GPU: both ways of `top_k_negatives` against what nothing exact can be faster than.

COCO's size in both directions, and a million by a million. Unit-norm random embeddings, five texts per image, ids masked. The
ways take turns. A ratio is the median over the runs, to the bfloat16 product alone (whose scores are thrown away) of the same
run; its keys are padded to a multiple of 8, without which matrix units are several times slower ("as it comes"). Recall is
against float32 brute force on some anchors. Memory is the peak beyond the embeddings.

    python benchmarks/search_cuda.py
    python benchmarks/search_cuda.py --device cpu --quick    # see that it runs
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from timing import Report, peak_memory, seconds_of
from torch import Tensor
from torch.nn.functional import normalize, pad

from lightning_itm.functional import TopK, top_k_negatives
from lightning_itm.functional.top_k_search import ways as searching
from lightning_itm.functional.top_k_search.grouped import group_keys, group_maxima

BUDGET = 1 << 30  # bytes of scores, the same for every way


def product(anchors: Tensor, keys: Tensor, multiple: int = 8) -> None:
    """Compute the scores in bfloat16 and throw them away."""
    low = pad(keys.bfloat16(), (0, 0, 0, -len(keys) % multiple)).T
    rows = max(1, BUDGET // (2 * low.shape[1]))
    scores = torch.empty(min(rows, len(anchors)), low.shape[1], dtype=torch.bfloat16, device=keys.device)
    for part in anchors.split(rows):
        torch.mm(part.bfloat16(), low, out=scores[: len(part)])


def plain(anchors: Tensor, keys: Tensor, k: int, anchor_id: Tensor, key_id: Tensor) -> None:
    """Search as it is usually written: products in bfloat16, in chunks, and torch.topk."""
    padding = -len(keys) % 8
    low, key_id = pad(keys.bfloat16(), (0, 0, 0, padding)).T, pad(key_id, (0, padding), value=-1)
    rows = max(1, BUDGET // (4 * low.shape[1]))
    for part, ids in zip(anchors.split(rows), anchor_id.split(rows), strict=True):
        scores = part.bfloat16() @ low
        is_left_out = (ids[:, None] == key_id) | (key_id < 0)
        scores.masked_fill_(is_left_out, -torch.inf).topk(min(k, len(keys)))


def best_of_groups(anchors: Tensor, keys: Tensor, k: int, anchor_id: Tensor, key_id: Tensor) -> None:
    """Run the kernel alone, in chunks."""
    size = searching.group_size(k, len(keys))
    grouped = group_keys(keys.bfloat16(), size, key_id.int())
    rows = max(1, BUDGET // (4 * searching._DEPTH * grouped.num_groups))
    for part, ids in zip(anchors.split(rows), anchor_id.split(rows), strict=True):
        group_maxima(part.bfloat16(), grouped, depth=searching._DEPTH, anchor_id=ids.int())


def recall(found: TopK, anchors: Tensor, keys: Tensor, k: int, anchor_id: Tensor, key_id: Tensor) -> float:
    """Return the share of the true k nearest that were found, on some anchors; ties within 1e-6 count."""
    some = torch.arange(0, len(anchors), max(1, len(anchors) // 256), device=anchors.device)
    torch.set_float32_matmul_precision("highest")
    scores = (anchors[some] @ keys.T).masked_fill_(anchor_id[some, None] == key_id, -torch.inf)
    kth = scores.topk(min(k, len(keys))).values[:, -1:]
    return float((scores.gather(1, found.index[some].clamp_min(0)) >= kth - 1e-6).double().mean())


def embeddings(number: int, dim: int, device: str) -> Tensor:
    """Make unit vectors, on the device at once: the host would take longer than the search."""
    generator = torch.Generator(device).manual_seed(number)
    made = torch.empty(number, dim, device=device)
    for part in made.split(100_000):
        part.copy_(normalize(torch.randn(part.shape, generator=generator, device=device), dim=1))
    return made


def measure(report: Report, num_images: int, num_texts: int, k: int, is_i2t: bool, args: argparse.Namespace) -> None:
    """Write the rows of one search."""
    image, text = (embeddings(number, args.dim, args.device) for number in (num_images, num_texts))
    image_id = torch.arange(num_images, device=args.device)
    text_id = torch.arange(num_texts, device=args.device) * num_images // num_texts
    anchors, keys, *ids = (image, text, image_id, text_id) if is_i2t else (text, image, text_id, image_id)
    search = partial(top_k_negatives, anchors, keys, k, anchor_id=ids[0], key_id=ids[1], memory_budget=BUDGET)
    ways: dict[str, Callable[[], object]] = {
        "bfloat16 product alone": lambda: product(anchors, keys),
        "the same, as it comes": lambda: product(anchors, keys, multiple=1),
        "best of each group alone": lambda: best_of_groups(anchors, keys, k, *ids),
        "bfloat16 product + torch.topk": lambda: plain(anchors, keys, k, *ids),
        "top_k_negatives, chunked": lambda: search(method="chunked"),
        "top_k_negatives, grouped": lambda: search(method="grouped"),
    }
    memory = {name: peak_memory(way, args.device) for name, way in ways.items()}  # and warms up
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.runs):
        for name, way in ways.items():
            seconds[name].append(seconds_of(way, args.device))
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds["bfloat16 product alone"], strict=True))
        found_share = ""
        if name.startswith("top_k"):
            found = search(method="grouped" if name.endswith("grouped") else "chunked")
            found_share = f"{recall(found, anchors, keys, k, *ids):.5f}"
        report.row(
            f"{len(anchors)} x {len(keys)}, k {k}",
            name,
            statistics.median(times),
            ratio,
            memory[name] / 1e9,
            found_share,
        )


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--group-size", type=int, help="of the grouped search, a power of two (default: chosen by k)")
    parser.add_argument("--quick", action="store_true", help="a thousandth of the size: see that it runs")
    parser.add_argument("--out", help="a file that the table is written to as well")
    args = parser.parse_args()
    if args.group_size is not None:
        searching.group_size = lambda *_: args.group_size
    divisor, args.runs = (500, 1) if args.quick else (1, args.runs)
    report = Report(
        args.device, args.out, ("search", 30), ("way", 32), ("s", 9), ("ratio", 8), ("GB", 7), ("recall", 9)
    )
    for num_images, num_texts, k, is_i2t in (
        (113_287, 566_435, 300, True),
        (113_287, 566_435, 60, True),
        (113_287, 566_435, 300, False),
        (113_287, 566_435, 60, False),
        (1_000_000, 1_000_000, 60, True),
    ):
        measure(report, num_images // divisor, num_texts // divisor, k, is_i2t, args)
    report.close(f"group size {args.group_size or 'by k'}, depth {searching._DEPTH}, median of {args.runs} runs")


if __name__ == "__main__":
    main()
