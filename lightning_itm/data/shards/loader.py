"""What a loader reads from shards: batches of pairs, for training, and every image once, for mining."""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset import shuffle as shuffled

from lightning_itm.data.batch import collate_pairs
from lightning_itm.data.pairs import UnreadablePairError
from lightning_itm.data.shards.dataset import ShardDataset
from lightning_itm.data.shards.stream import ShardStream, read_images
from lightning_itm.randomness import seeded


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


class StreamedBatches(IterableDataset[dict[str, Any]]):
    """The batches of one rank, from a given one on; each worker yields its own.

    Args:
        stream: What is read.
        batch_size: Pairs a batch on one rank.
        drop_last: Leave out the pairs that do not fill a batch.
        rank: This rank.
        world_size: Number of ranks.
        seed: Order, buffer and augmentation are functions of it and the epoch.
    """

    def __init__(
        self, stream: ShardStream, batch_size: int, *, drop_last: bool, rank: int, world_size: int, seed: int
    ) -> None:
        self.stream, self.batch_size, self.drop_last = stream, batch_size, drop_last
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.position = torch.zeros(2, dtype=torch.int64).share_memory_()  # the epoch, and how many batches are done

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, num_done = self.position.tolist()
        info = get_worker_info()
        num_workers = 1 if info is None else info.num_workers
        # The first batch is asked of the first process, whoever would have had its turn.
        worker = (num_done + (0 if info is None else info.id)) % num_workers
        share = share_of(
            len(self.stream),
            self.batch_size,
            drop_last=self.drop_last,
            rank=self.rank,
            world_size=self.world_size,
            worker=worker,
            num_workers=num_workers,
        )
        sizes_done = share.batch_sizes[: len(range(worker, num_done, num_workers))]
        pairs = self._pairs(epoch, worker, share, num_skipped=sum(sizes_done))
        for size in share.batch_sizes[len(sizes_done) :]:
            yield collate_pairs([next(pairs) for _ in range(size)])

    def _pairs(self, epoch: int, worker: int, share: Share, num_skipped: int) -> Iterator[dict[str, Any]]:
        """Yield as many pairs as the share has; a neighbour stands in for one that can't be used."""
        order = self.stream.shard_order(self.seed, epoch)
        with seeded(self.seed, epoch, self.rank, worker):
            rng = random.Random(random.getrandbits(64))
        buffer = self.stream.shuffle_buffer
        read = shuffled(buffer, initial=max(1, buffer // 4), rng=rng)(self.stream.read(order, share.start, share.stop))
        last, num_missing = None, 0
        for number, (text_id, data) in enumerate(read):
            if number < num_skipped:
                continue
            try:
                with seeded(self.seed, epoch, text_id):
                    last = self.stream.load(text_id, data)
            except UnreadablePairError as error:
                self.stream.pairs.report(error)
                num_missing += 1
                continue
            for _ in range(1 + num_missing):
                yield last
            num_missing = 0
        for _ in range(num_missing):
            if last is None:
                raise RuntimeError(
                    f"None of the {share.stop - share.start - num_skipped} pairs of a worker can be read. See the warning "
                    "above for the first of them."
                )
            yield last


class StreamedImages(IterableDataset[tuple[Any, int, bool]]):
    """Each image of a rank's share once, as for evaluation, in the order of the shards, with its id, and whether it opened.

    Args:
        pairs: The shards.
        rank: This rank.
        world_size: Number of ranks; every one has as many images, so the last image may come several times.
    """

    def __init__(self, pairs: ShardDataset, *, rank: int, world_size: int) -> None:
        self.pairs, self.rank, self.world_size = pairs, rank, world_size

    def __iter__(self) -> Iterator[tuple[Any, int, bool]]:
        info, number = get_worker_info(), len(self.pairs.images)
        share = share_of(
            number,
            1,
            drop_last=False,
            rank=self.rank,
            world_size=self.world_size,
            worker=0 if info is None else info.id,
            num_workers=1 if info is None else info.num_workers,
        )
        wanted = [min(place, number - 1) for place in range(share.start, share.stop)]
        loaded, waiting = None, list[int]()
        for image_id, data in self._read(wanted):
            try:
                if data is None:
                    raise UnreadablePairError(self.pairs.missing(image_id))
                loaded = self.pairs.load_data(image_id, data)
            except UnreadablePairError:
                waiting.append(image_id)  # for anything that looks like an image
                continue
            yield loaded, image_id, True
            yield from ((loaded, other, False) for other in waiting)
            waiting = []
        if waiting and loaded is None:
            raise UnreadablePairError(f"None of the {len(wanted)} images of a worker can be read.")
        yield from ((loaded, other, False) for other in waiting)

    def _read(self, wanted: list[int]) -> Iterator[tuple[int, bytes | None]]:
        contents = self.pairs.contents
        for shard, group in itertools.groupby(wanted, contents.shard_of):
            times = Counter(group)
            for image_id, data in read_images(contents, shard, times):
                yield from [(image_id, data)] * times[image_id]


class StreamLoader:
    """Batches of a :class:`ShardStream`, resumable at any of them.

    It is no DataLoader, but its length is exact: Lightning, which mistrusts the length of every iterable dataset, knows when
    to validate and how far the progress bar is.

    Args:
        batches: What the workers read.
        position: As for :class:`~lightning_itm.data.resumable_loader.EpochSampler`.
        **options: Of the DataLoader.
    """

    def __init__(self, batches: StreamedBatches, position: Callable[[], tuple[int, int]], **options: Any) -> None:
        self.batches, self.position = batches, position
        self.loader: DataLoader[Any] = DataLoader(batches, batch_size=None, **options)

    def __len__(self) -> int:
        batches = self.batches
        return len(
            batch_sizes(
                len(batches.stream), batches.batch_size, drop_last=batches.drop_last, world_size=batches.world_size
            )
        )

    def __iter__(self) -> Iterator[Any]:
        # A generator: Lightning makes an iterator only to see whether it can, and workers would start for it.
        self.batches.position.copy_(torch.tensor(self.position()))
        yield from self.loader

    @property
    def _iterator(self) -> Any:
        """What Lightning shuts down after a fit: the workers."""
        return self.loader._iterator

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self.loader._iterator = value

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the position is in the datamodule's state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: the datamodule is asked for the position."""
