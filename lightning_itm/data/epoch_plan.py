"""Which part of an epoch each worker of each rank reads, known beforehand."""

from typing import NamedTuple


class Share(NamedTuple):
    """What one worker of one rank reads in an epoch."""

    start: int
    stop: int
    batch_sizes: list[int]


def share_of(
    num_pairs: int, batch_size: int, *, drop_last: bool, rank: int, world_size: int, worker: int, num_workers: int
) -> Share:
    """Cut an epoch into equal parts.

    Rank and worker own consecutive places of the row of all pairs; the workers of a rank take turns, a batch each.

    Args:
        num_pairs: In the epoch, on all ranks.
        batch_size: On each rank.
        drop_last: Leave out the pairs that do not fill a batch.
        rank: This rank.
        world_size: Number of ranks.
        worker: This worker.
        num_workers: Of each rank; 1 where the main process loads.

    Example:
        >>> share_of(10, 4, drop_last=False, rank=0, world_size=1, worker=1, num_workers=2)
        Share(start=6, stop=10, batch_sizes=[4])
    """
    sizes = batch_sizes(num_pairs, batch_size, drop_last=drop_last, world_size=world_size)
    start = rank * -(-num_pairs // world_size) + sum(sum(sizes[other::num_workers]) for other in range(worker))
    mine = sizes[worker::num_workers]
    return Share(start, start + sum(mine), mine)


def batch_sizes(num_pairs: int, batch_size: int, *, drop_last: bool, world_size: int) -> list[int]:
    """Return the sizes of the batches of an epoch, which are those of every rank."""
    on_rank = -(-num_pairs // world_size)
    whole, rest = divmod(on_rank, batch_size)
    return [batch_size] * whole + [rest] * (rest > 0 and not drop_last)
