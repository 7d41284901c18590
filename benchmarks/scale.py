"""What a very large set would take, on paper: memory, traffic, products, files. Prints the tables of docs/scale.md.

    python benchmarks/scale.py                                     # a billion pairs on 64 GPUs
    python benchmarks/scale.py --pairs 20000000 --gpus 8 --dim 768
    python benchmarks/scale.py --check                             # compares each formula with what is measured, in small

One text per image. Units are decimal: 1 GB is 10^9 bytes.
"""

import argparse
from dataclasses import dataclass

SIZES = (1_000_000, 10_000_000, 100_000_000, 1_000_000_000)
INT32_MAX = 2**31 - 1
PROBES = 64
"""Cells of an approximate index that are searched per anchor."""
LIST_BYTES = 220
"""Bytes per pair of the Python lists in which hard batches are composed, measured by ``--check``."""


@dataclass
class Plan:
    """Say what is planned. All counts that follow are formulas of these.

    Args:
        pairs: Number of pairs of the set, with one text per image.
        gpus: Number of GPUs that share the work.
        dim: Width of an embedding.
        places: Mined texts per image, and mined images per text.
        tflops: Products per second of one GPU in bfloat16, in 10^12 floating-point operations.
        efficiency: The fraction of it that the search reaches.
        bandwidth: What one GPU sends and receives, in GB per second each.
        pair_gflops: Floating-point operations of both towers for one pair, forward, in 10^9.
        order_seconds: Seconds per million pairs in which one core composes hard batches.
    """

    pairs: int = 1_000_000_000
    gpus: int = 64
    dim: int = 512
    places: tuple[int, int] = (32, 8)
    tflops: float = 400
    efficiency: float = 0.4
    bandwidth: float = 25
    pair_gflops: float = 14.8
    order_seconds: float = 5

    def half_bytes(self) -> int:
        """Return the bytes of all embeddings of both sides in half precision."""
        return 2 * 2 * self.pairs * self.dim

    def traffic_bytes(self) -> float:
        """Return the bytes that a GPU receives when the keys of both directions go round in blocks."""
        return self.half_bytes() * (self.gpus - 1) / self.gpus

    def search_flops(self) -> int:
        """Return the operations of both directions of an exact search: a multiplication and an addition per place."""
        return 2 * 2 * self.pairs * self.pairs * self.dim

    def search_hours(self) -> float:
        """Return the hours of an exact search."""
        return self.hours(self.search_flops())

    def train_flops(self) -> float:
        """Return the operations of an epoch. A step costs three times its forward pass."""
        return 3 * self.pair_gflops * 1e9 * self.pairs

    def hours(self, flops: float) -> float:
        """Return the hours of so many operations on all GPUs."""
        return flops / (self.gpus * self.tflops * 1e12 * self.efficiency) / 3600

    def table_bytes(self) -> int:
        """Return the bytes of the table of mined negatives, in int32."""
        return 4 * sum(self.places) * self.pairs

    def order_bytes(self) -> int:
        """Return the bytes of the order of an epoch of hard batches and its groups, in int32."""
        return 2 * 4 * self.pairs

    def checkpoint_bytes(self) -> int:
        """Return what mining adds to a checkpoint: table and order."""
        return self.table_bytes() + self.order_bytes() // 2  # groups are not saved

    def training_rows_bytes(self) -> int:
        """Return what ``encode="training"`` adds to it: half-precision rows, and a byte per pair."""
        return self.half_bytes() + self.pairs

    def even_pairs(self) -> float:
        """Return the number of pairs at which an exact search costs as much as an epoch of training."""
        return 3 * self.pair_gflops * 1e9 / (4 * self.dim)


def amount(number: float, unit: str = "B") -> str:
    """Return a number with three digits and the prefix of its unit.

    Example:
        >>> amount(2.048e12)
        '2.05 TB'
    """
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:,.0f} {unit}"


def power(number: float) -> str:
    """Return a number as a product with a power of ten, with three digits.

    Example:
        >>> power(2.048e21)
        '2.05 · 10²¹'
    """
    digits, exponent = f"{number:.2e}".split("e+")
    return f"{digits} · 10{str(int(exponent)).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def duration(hours: float) -> str:
    """Return hours in words: below two minutes in seconds, below two hours in minutes."""
    if hours < 1 / 30:
        return f"{hours * 3600:.2g} s"
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:,.0f} h"


def needs(plan: Plan) -> list[tuple[str, str, str]]:
    """Return the first table: what is needed, its formula, and how much it is."""
    first, second = plan.places
    return [
        ("embeddings of both sides, half precision", "4 · pairs · dim bytes", amount(plan.half_bytes())),
        ("the same, per GPU, cut in equal parts", "÷ GPUs", amount(plan.half_bytes() / plan.gpus)),
        ("the same, whole and in float32 on each GPU", "8 · pairs · dim bytes", amount(2 * plan.half_bytes())),
        (
            "received per GPU while keys go round, both directions",
            "4 · pairs · dim · (GPUs − 1) ÷ GPUs bytes",
            amount(plan.traffic_bytes()),
        ),
        (
            f"the same at {plan.bandwidth:g} GB/s",
            "÷ bandwidth",
            duration(plan.traffic_bytes() / (plan.bandwidth * 1e9) / 3600),
        ),
        ("exact search, both directions", "4 · pairs² · dim operations", power(plan.search_flops())),
        (
            f"the same at {plan.tflops:g} TFLOP/s per GPU and an efficiency of {plan.efficiency:g}",
            "÷ GPUs ÷ rate ÷ efficiency",
            duration(plan.search_hours()),
        ),
        (
            "one epoch of training, ViT-B-32 and its text tower",
            f"3 · {plan.pair_gflops:g} · 10⁹ · pairs operations",
            power(plan.train_flops()),
        ),
        ("the same, at that rate", "÷ GPUs ÷ rate ÷ efficiency", duration(plan.hours(plan.train_flops()))),
        (
            f"table of {first} + {second} places, on each machine",
            "4 · places · pairs bytes",
            amount(plan.table_bytes()),
        ),
        ("hard batches: order and groups", "8 · pairs bytes", amount(plan.order_bytes())),
        ("hard batches: lists while they are composed", f"{LIST_BYTES} · pairs bytes", amount(LIST_BYTES * plan.pairs)),
        (
            "hard batches: time on one core",
            f"{plan.order_seconds:g} s per million pairs",
            duration(plan.order_seconds * plan.pairs / 1e6 / 3600),
        ),
        ("added to a checkpoint: table and order", "4 · (places + 1) · pairs bytes", amount(plan.checkpoint_bytes())),
        (
            'the same with `encode="training"`',
            "+ (4 · dim + 1) · pairs bytes",
            amount(plan.checkpoint_bytes() + plan.training_rows_bytes()),
        ),
    ]


def growth(plan: Plan) -> list[tuple[str, ...]]:
    """Return the second table: embeddings, exact search and training, as the set grows."""
    rows: list[tuple[str, ...]] = []
    for pairs in SIZES:
        larger = Plan(**{**vars(plan), "pairs": pairs})
        sizes = amount(2 * larger.half_bytes()), amount(larger.half_bytes() / plan.gpus)
        times = duration(larger.search_hours()), duration(larger.hours(larger.train_flops()))
        rows.append((f"{pairs:,}", *sizes, *times, f"{larger.search_flops() / larger.train_flops():.2g}"))
    return rows


def parts(plan: Plan) -> list[tuple[str, ...]]:
    """Return the third table: mining within parts of a set, and an approximate index."""
    # pairs ÷ size parts, each with 4 · size² · dim operations
    ways: list[tuple[str, float]] = [
        (f"parts of {size:,} pairs", 4 * plan.pairs * size * plan.dim) for size in SIZES[:-1]
    ]
    cells = round(4 * plan.pairs**0.5)
    compared = cells + PROBES * plan.pairs / cells  # all centres, and the keys of the nearest cells
    ways.append((f"{cells:,} cells, {PROBES} looked into", 4 * plan.pairs * compared * plan.dim))
    return [(name, duration(plan.hours(flops)), f"{flops / plan.train_flops():.2g}") for name, flops in ways]


def markdown(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a table in Markdown."""
    lines = [titles, tuple("---" for _ in titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(plan: Plan) -> str:
    """Return everything that is printed."""
    needed = markdown(("what", "formula", "amount"), [*needs(plan)])
    grown = markdown(
        ("pairs", "float32 on each GPU", "half precision, cut", "exact search", "epoch", "search ÷ epoch"),
        [*growth(plan)],
    )
    cut = markdown(("search", "time", "search ÷ epoch"), [*parts(plan)])
    first = f"{plan.pairs:,} pairs on {plan.gpus} GPUs, dimension {plan.dim}"
    even = f"Search and epoch cost the same at {plan.even_pairs() / 1e6:.0f} million pairs."
    last = f"Ids in int32 end at {INT32_MAX:,}."
    return "\n\n".join([first, needed, grown, even, cut, last])


def main() -> None:
    """Print the tables, or check the formulas."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in vars(Plan()).items():
        flag = f"--{name.replace('_', '-')}"
        if name == "places":
            parser.add_argument(flag, type=int, nargs=2, default=value, metavar=("TEXTS", "IMAGES"))
        else:
            parser.add_argument(flag, type=type(value), default=value, help=f"default: {value:,}")
    parser.add_argument("--check", action="store_true", help="compare the formulas with what is measured, in small")
    args = vars(parser.parse_args())
    if args.pop("check"):
        from scale_check import check

        check()
        return
    print(report(Plan(**{**args, "places": tuple(args["places"])})))


if __name__ == "__main__":
    main()
