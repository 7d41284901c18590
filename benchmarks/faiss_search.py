"""From which size does an index of FAISS pay? Seconds of the exact search and of one with an index, and what that finds.

The embeddings are made, and meant to be like those of a fine-tuned CLIP. There are as many topics as pairs / 50. Each topic is
a unit vector in a space of 64 dimensions, near one of 200 subjects. A pair is its topic plus noise. Its image and its text are
the pair plus noise of their own, mapped into 512 dimensions, plus a vector that all images (or all texts) have in common, as
the two sides of CLIP lie apart. All are scaled to unit norm. The cosine of a pair and that of other pairs are printed.

Both searches are `find_negatives` in both directions, as a mining step runs it. The seconds with an index have all in them:
training it, adding the keys, searching, comparing exactly, and measuring the recall. One run of each, with as many threads for
torch as for FAISS. Behind the seconds of the clock are those of the CPU, of all threads together: look at these, with one
thread, on a machine that has other work.

    pip install "lightning_itm[faiss]"
    python benchmarks/faiss_search.py
    python benchmarks/faiss_search.py --pairs 500000 --index "IVF2828,Flat nprobe=64" "IVF2828,PQ64 nprobe=64"
"""

import argparse
import time
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_itm.mining import EncodedPairs, MinedNegatives, find_negatives
from lightning_itm.mining.search.faiss_index import default_index

INNER_DIM, NUM_SUBJECTS, PAIRS_PER_TOPIC = 64, 200, 50
TOPIC_NOISE, PAIR_NOISE, SIDE_NOISE, APART = 0.8, 0.6, 0.5, 0.7


def make_pairs(num: int, dim: int, seed: int = 0) -> EncodedPairs:
    """Make unit-norm embeddings of pairs, as described above."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, width: int) -> Tensor:
        return normalize(torch.randn(rows, width, generator=generator), dim=1)

    def choose(rows: Tensor, count: int) -> Tensor:
        return rows[torch.randint(0, len(rows), (count,), generator=generator)]

    subjects = draw(NUM_SUBJECTS, INNER_DIM)
    num_topics = max(1, num // PAIRS_PER_TOPIC)
    topics = normalize(choose(subjects, num_topics) + TOPIC_NOISE * draw(num_topics, INNER_DIM), dim=1)
    pairs = normalize(choose(topics, num) + PAIR_NOISE * draw(num, INNER_DIM), dim=1)
    into = torch.linalg.qr(torch.randn(dim, INNER_DIM, generator=generator)).Q.T  # (inner dim, dim), orthogonal rows
    sides = []
    for _ in ("images", "texts"):
        rows = normalize(pairs + SIDE_NOISE * draw(num, INNER_DIM), dim=1) @ into
        sides.append(normalize(rows + APART * draw(1, dim), dim=1))
    is_valid = torch.ones(num, dtype=torch.bool)
    return EncodedPairs(sides[0], sides[1], torch.arange(num), is_valid, is_valid)


class Seconds(NamedTuple):
    """What a search took."""

    clock: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.clock:.1f} s ({self.cpu:.1f} s of CPU)"


def timed(pairs: EncodedPairs, k: int, **options: Any) -> tuple[Seconds, MinedNegatives]:
    """Search in both directions. Return the seconds and what was found."""
    start, start_cpu = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The index found")
        mined = find_negatives(pairs, k, k, **options)
    return Seconds(time.perf_counter() - start, time.process_time() - start_cpu), mined


def main() -> None:
    """Measure and print a line per size and index."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--k", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--index", nargs="+", help="factory strings; default: that of the package")
    parser.add_argument("--no_exact", action="store_true", help="leave the exact search out, for large sets")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.threads} threads, width {args.dim}, {args.k} negatives in both directions")
    for num in args.pairs:
        pairs = make_pairs(num, args.dim)
        of_pair = (pairs.image_embeddings * pairs.text_embeddings).sum(dim=1)
        others = (pairs.image_embeddings * pairs.text_embeddings.roll(1, 0)).sum(dim=1)
        print(f"{num:,} pairs: cosine of a pair {of_pair.mean():.2f}, of others {others.mean():.2f}", flush=True)
        exact = None
        if not args.no_exact:
            exact, mined = timed(pairs, args.k)
            print(
                f"  exact: {exact}. Cosine of the hardest negative {mined.text_scores[:, 0].mean():.2f}",
                flush=True,
            )
        for name in args.index or [default_index(num)]:
            seconds, mined = timed(pairs, args.k, search="faiss", faiss_index=name)
            ratio = ""
            if exact is not None:
                ratio = f", {exact.clock / seconds.clock:.2f} x as fast ({exact.cpu / seconds.cpu:.2f} x)"
            print(f"  {name}: {seconds}{ratio}, recall {mined.recall:.3f}", flush=True)


if __name__ == "__main__":
    main()
