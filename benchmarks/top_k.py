"""Exact top-k over a whole set: `top_k_negatives` against FAISS's exact index, the chunked plain way, and the bare product.

Unit-norm random embeddings. The guard leaves out the hardest key of most anchors. All in one process, with as many threads
for each; the median of several interleaved runs, as a ratio to `faiss.IndexFlatIP`. Recall is against float64. FAISS is no
dependency of the package:

    pip install faiss-cpu
    python benchmarks/top_k.py
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import faiss
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_itm.functional import top_k_negatives


def plain(anchors: Tensor, keys: Tensor, k: int) -> Tensor:
    """Search as it is usually written: float32 products in chunks, and torch.topk."""
    return torch.cat([(part @ keys.T).topk(k).indices for part in anchors.split(512)])


def product(anchors: Tensor, keys: Tensor) -> None:
    """Compute the scores in bfloat16 and throw them away: what no exact search can be much faster than."""
    low = keys.bfloat16().T
    scores = torch.empty(512, len(keys), dtype=torch.bfloat16)
    for part in anchors.split(512):
        torch.mm(part.bfloat16(), low, out=scores[: len(part)])


def recall(index: Tensor, anchors: Tensor, keys: Tensor, k: int) -> float:
    """Return the share of the true k nearest that were found, on some anchors, against float64."""
    some = slice(None, None, max(1, len(anchors) // 256))
    true = (anchors[some].double() @ keys.double().T).topk(k).indices
    hits = [len(set(a) & set(b)) for a, b in zip(true.tolist(), index[some].tolist(), strict=True)]
    return sum(hits) / true.numel()


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anchors", type=int, default=4096)
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--k", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    anchors = normalize(torch.randn(args.anchors, args.dim, generator=generator), dim=1)
    keys = normalize(torch.randn(args.keys, args.dim, generator=generator), dim=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = top_k_negatives(anchors, keys, args.k)
    beyond = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    limit = float(found.scores[:, 0].quantile(0.1))
    index = faiss.IndexFlatIP(args.dim)
    index.add(keys.numpy())
    ways: dict[str, Callable[[], object]] = {
        "faiss.IndexFlatIP": lambda: index.search(anchors.numpy(), args.k),
        "top_k_negatives": lambda: top_k_negatives(anchors, keys, args.k),
        "top_k_negatives with a guard": lambda: top_k_negatives(anchors, keys, args.k, max_score=limit),
        "float32 product + torch.topk": lambda: plain(anchors, keys, args.k),
        "bfloat16 product alone": lambda: product(anchors, keys),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.runs):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)

    print(f"{args.anchors} x {args.keys} x {args.dim}, k {args.k}, {args.threads} threads, median of {args.runs} runs")
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds["faiss.IndexFlatIP"], strict=True))
        print(f"{name:32}{statistics.median(times):8.3f} s{ratio:8.2f} x FAISS")
    print(f"recall against float64: {recall(found.index, anchors, keys, args.k):.5f}")
    print(f"memory beyond the inputs, peak: {beyond:.0f} MB")


if __name__ == "__main__":
    main()
