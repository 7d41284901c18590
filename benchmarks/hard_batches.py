"""What composing an epoch of hard batches costs: seconds and memory per million pairs, on one core.

The table is made up: neighbours of a pair lie near it on a line, in both directions, so that many pairs want the same ones.

    python benchmarks/hard_batches.py                       # one million pairs, about a minute
    python benchmarks/hard_batches.py --pairs 100000 1000000 2000000
"""

import argparse
import resource
import statistics
import time

import torch

from lightning_itm.mining import compose_batches

REACH = 200


def neighbours(num_pairs: int, width: int) -> torch.Tensor:
    """Return a table of near pairs, int32 `(pairs, width)`, never the pair itself."""
    offset = torch.randint(1, REACH, (num_pairs, width), dtype=torch.int32)
    sign = torch.randint(0, 2, (num_pairs, width), dtype=torch.int32) * 2 - 1
    return (torch.arange(num_pairs, dtype=torch.int32)[:, None] + sign * offset) % num_pairs


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000_000], help="sizes of the set (1,000,000)")
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--width", type=int, default=60, help="texts per image and images per text (60)")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
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
