"""Memory per process of mining with `split_embeddings`, against the number of processes, and whether the tables are equal.

A set of few images (the anchors) and many texts (the keys), so that the search takes minutes and the embeddings most of the
memory. Unit-norm random embeddings, which each process makes for its own rows. Memory is the peak of the resident set beyond
what the process had before its embeddings, the highest of all processes. A part of it are the embeddings that a process holds.
The rest is the block of keys that is searched, and its scores, as much for any set of more than 65,536 keys. Tables are
compared by a number per row. The first line is the search with all embeddings on each process, in float32, of the same
rounded values.

    python benchmarks/sharded_search.py
    python benchmarks/sharded_search.py --quick    # see that it runs
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from lightning_itm.functional import TopK
from lightning_itm.mining import EncodedPairs, find_negatives
from lightning_itm.mining.encoded import Division, SplitPairs, SplitRows
from lightning_itm.mining.search import search_split_pairs

TEXTS_PER_IMAGE, IMAGES_PER_TEXT = 60, 10


def own_rows(division: Division, dim: int, seed: int) -> Tensor:
    """Make the rows of a process, tile by tile, so that they are the same for any number of processes."""
    own = torch.empty(division.own.stop - division.own.start, dim, dtype=torch.float16)
    for tile in division.tiles(division.rank):
        generator = torch.Generator().manual_seed(seed * 10**9 + tile.start)
        rows = torch.randn(tile.stop - tile.start, dim, generator=generator)
        own[tile.start - division.own.start : tile.stop - division.own.start] = normalize(rows, dim=1).half()
    return own


def digest(index: Tensor) -> Tensor:
    """Return a number for each row of a table, `(rows,)`."""
    weights = torch.randint(-(2**62), 2**62, (index.shape[1],), generator=torch.Generator().manual_seed(0))
    return (index.long() * weights).sum(dim=1)


def peak() -> float:
    """Return the peak of the resident set so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def search(rank: int, world_size: int, is_whole: bool, folder: str, options: dict[str, Any]) -> None:
    """Search in one process, and save what it took and the numbers of its table."""
    torch.set_num_threads(options["threads"])
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    sizes = {"images": options["anchors"], "texts": options["keys"]}
    # A table has the name of its entries: that of texts has a row per image.
    rows = {"texts": torch.zeros(sizes["images"]).long(), "images": torch.zeros(sizes["texts"]).long()}
    owner = torch.arange(sizes["texts"]) % sizes["images"]
    rest = owner, torch.ones(sizes["images"]) > 0, torch.ones(sizes["texts"]) > 0
    before, start = peak(), time.perf_counter()
    divisions = {name: Division(size, rank, world_size) for name, size in sizes.items()}
    own = {name: own_rows(divisions[name], options["dim"], seed) for seed, name in enumerate(sizes)}
    if is_whole:
        pairs = EncodedPairs(own.pop("images").float(), own.pop("texts").float(), *rest)
        mined = find_negatives(pairs, TEXTS_PER_IMAGE, IMAGES_PER_TEXT)
        rows = {"images": digest(mined.images), "texts": digest(mined.texts)}
    else:
        images, texts = (SplitRows(own[name], divisions[name]) for name in sizes)

        def write(name: str, part: slice, found: TopK) -> None:
            rows[name][part] = digest(found.index)

        search_split_pairs(SplitPairs(images, texts, *rest), TEXTS_PER_IMAGE, IMAGES_PER_TEXT, write)
    result = {
        "beyond": peak() - before,
        "seconds": time.perf_counter() - start,
        "rows": (rows["texts"], rows["images"]),
    }
    torch.save(result, Path(folder, f"{rank}.pt"))
    if world_size > 1:
        dist.destroy_process_group()


def measure(world_size: int, is_whole: bool, options: dict[str, Any]) -> tuple[float, float, list[Any]]:
    """Return the highest memory and the seconds of a search on so many processes, and the tables of all."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")  # each begins anew: a fork would have the memory of this one
        arguments = [(rank, world_size, is_whole, folder, options) for rank in range(world_size)]
        processes = [context.Process(target=search, args=part) for part in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        results = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(world_size)]
    most, longest = (max(result[name] for result in results) for name in ("beyond", "seconds"))
    return most, longest, [result["rows"] for result in results]


def main() -> None:
    """Measure and print a line per number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=400_000)
    parser.add_argument("--anchors", type=int, default=2_048)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--quick", action="store_true", help="20,000 keys and 64 anchors")
    options = vars(parser.parse_args())
    if options["quick"]:
        options |= {"keys": 20_000, "anchors": 64}
    embeddings = 2 * options["dim"] * (options["keys"] + options["anchors"]) / 1e6
    print(
        f"{options['keys']:,} keys, {options['anchors']:,} anchors, width {options['dim']}: {embeddings:.0f} MB in float16"
    )
    most, seconds, (expected,) = measure(1, True, options)
    print(f"all on each process: {most:6.0f} MB, {seconds:4.0f} s")
    for world_size in options["processes"]:
        most, seconds, tables = measure(world_size, False, options)
        is_equal = all(torch.equal(a, b) for table in tables for a, b in zip(table, expected, strict=True))
        held = embeddings / world_size
        print(
            f"split over {world_size}:        {most:6.0f} MB = {held:4.0f} MB of embeddings + {most - held:4.0f} MB, "
            f"{seconds:4.0f} s, equal tables: {is_equal}"
        )


if __name__ == "__main__":
    main()
