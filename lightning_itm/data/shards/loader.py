"""What the workers of a loader read from shards: batches of pairs for training, and every image once for mining."""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset import shuffle as shuffled

from lightning_itm.data.batch import collate_pairs
from lightning_itm.data.inputs.stand_ins import with_drawn_stand_ins
from lightning_itm.data.shards.dataset import ShardDataset
from lightning_itm.data.shards.stream import ShardStream, read_images
from lightning_itm.randomness import seeded
from lightning_itm.unreadable import with_stand_ins

StoredPair = tuple[int, bytes | None]
"""The id of a text, and the bytes of its image, or None where it is no longer in its shard."""


class EpochPart(NamedTuple):
    """Say what one worker of one rank reads in an epoch.

    Attributes:
        start: The index of its first pair, in the row of all pairs of the epoch.
        stop: The index after its last pair. It may be more than there are pairs. Then the row starts anew.
        batch_sizes: The size of each batch of this worker.
    """

    start: int
    stop: int
    batch_sizes: list[int]


def epoch_part(
    num_pairs: int, batch_size: int, *, drop_last: bool, rank: int, world_size: int, worker: int, num_workers: int
) -> EpochPart:
    """Cut an epoch into equal parts, and return the part of one worker.

    A rank reads pairs that stand side by side in the row of the epoch, and so does each of its workers. The workers of a rank
    take turns: each yields one batch, then the next worker yields one.

    Args:
        num_pairs: Number of pairs of the epoch, on all ranks together.
        batch_size: Number of pairs per batch on one rank.
        drop_last: Leave out the pairs that do not fill a batch.
        rank: The rank of the process, from 0.
        world_size: Number of processes that train together.
        worker: The worker of this rank, from 0.
        num_workers: Number of workers per rank. It is 1 where the main process loads.

    Example:
        >>> from lightning_itm.data.shards.loader import epoch_part
        >>> epoch_part(10, 4, drop_last=False, rank=0, world_size=1, worker=1, num_workers=2)
        EpochPart(start=6, stop=10, batch_sizes=[4])
    """
    sizes = batch_sizes(num_pairs, batch_size, drop_last=drop_last, world_size=world_size)
    num_on_rank = -(-num_pairs // world_size)  # rounded up: as many on every rank
    start = rank * num_on_rank + sum(sum(sizes[other::num_workers]) for other in range(worker))
    own_sizes = sizes[worker::num_workers]
    return EpochPart(start, start + sum(own_sizes), own_sizes)


def batch_sizes(num_pairs: int, batch_size: int, *, drop_last: bool, world_size: int) -> list[int]:
    """Return the sizes of the batches that each rank has in an epoch. They are the same on every rank.

    Args:
        num_pairs: Number of pairs of the epoch, on all ranks together.
        batch_size: Number of pairs per batch on one rank.
        drop_last: Leave out the pairs that do not fill a batch.
        world_size: Number of processes that train together.
    """
    num_on_rank = -(-num_pairs // world_size)
    whole, rest = divmod(num_on_rank, batch_size)
    return [batch_size] * whole + [rest] * (rest > 0 and not drop_last)


class StreamedBatches(IterableDataset[dict[str, Any]]):
    """Read the batches of one rank from a stream, from a given batch on. Each worker yields its own.

    Args:
        stream: The plan by which the shards are read.
        batch_size: Number of pairs per batch on one rank.
        drop_last: Leave out the pairs that do not fill a batch.
        rank: The rank of this process, from 0.
        world_size: Number of processes that train together.
        seed: Order, buffer and augmentation are functions of this seed and the epoch.
    """

    def __init__(
        self, stream: ShardStream, batch_size: int, *, drop_last: bool, rank: int, world_size: int, seed: int
    ) -> None:
        self.stream, self.batch_size, self.drop_last = stream, batch_size, drop_last
        self.rank, self.world_size, self.seed = rank, world_size, seed
        # The epoch, and how many batches are done. Shared: workers that persist see what the main process writes.
        self.position = torch.zeros(2, dtype=torch.int64).share_memory_()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, num_done = self.position.tolist()
        worker, num_workers = _worker()
        # The loader asks its first process first, so after a resume that process takes the turn of the next batch.
        worker = (worker + num_done) % num_workers
        part = epoch_part(
            len(self.stream),
            self.batch_size,
            drop_last=self.drop_last,
            rank=self.rank,
            world_size=self.world_size,
            worker=worker,
            num_workers=num_workers,
        )
        num_own_done = len(range(worker, num_done, num_workers))
        pairs = self._pairs(epoch, worker, part, num_skipped=sum(part.batch_sizes[:num_own_done]))
        for size in part.batch_sizes[num_own_done:]:
            yield collate_pairs([next(pairs) for _ in range(size)])

    def _pairs(self, epoch: int, worker: int, part: EpochPart, num_skipped: int) -> Iterator[dict[str, Any]]:
        order = self.stream.shard_order(self.seed, epoch)
        with seeded(self.seed, epoch, self.rank, worker):
            rng = random.Random(random.getrandbits(64))
        buffer = self.stream.shuffle_buffer
        read = shuffled(buffer, initial=max(1, buffer // 4), rng=rng)(self.stream.read(order, part.start, part.stop))
        # What was done before a resume is read again, because it fills the buffer, but it is not decoded. All ranks must keep
        # the same number of batches, so that another pair stands in for what can't be read.
        yield from with_drawn_stand_ins(
            read,
            partial(self._load, epoch),
            what="pairs",
            report=lambda error, key: self.stream.pairs.report(error, key[0]),
            draw=lambda key: random.Random(repr((self.seed, epoch, key[0]))).randrange,
            num_skipped=num_skipped,
        )

    def _load(self, epoch: int, wanted: StoredPair, loaded: StoredPair) -> dict[str, Any]:
        with seeded(self.seed, epoch, wanted[0]):  # by the pair, and not by the worker that happens to read it
            return self.stream.load(*loaded)


class StreamedImages(IterableDataset[dict[str, Any]]):
    """Read each image of this rank once, from front to back, as evaluation sees it. For remote shards, which are mined so.

    Yields what :class:`~lightning_itm.data.EvaluationItems` reads by id: a dict such as
    ``{"image": ..., "image_id": 3, "image_is_valid": True}``. A neighbour stands in for an image that does not open.

    Args:
        pairs: The shards that are read. Give a view of :meth:`~lightning_itm.ImageTextDataset.evaluation`.
        rank: The rank of this process, from 0.
        world_size: Number of processes. Each has as many images, so the last image may come several times.
    """

    def __init__(self, pairs: ShardDataset, *, rank: int, world_size: int) -> None:
        self.pairs, self.rank, self.world_size = pairs, rank, world_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        num_images = len(self.pairs.images)
        worker, num_workers = _worker()
        part = epoch_part(
            num_images,
            1,
            drop_last=False,
            rank=self.rank,
            world_size=self.world_size,
            worker=worker,
            num_workers=num_workers,
        )
        wanted = [min(index, num_images - 1) for index in range(part.start, part.stop)]
        attempts = ((image_id, partial(self.pairs.load_data, image_id, data)) for image_id, data in self._read(wanted))
        for image, image_id, is_own in with_stand_ins(attempts, what="images"):
            yield {"image": image, "image_id": image_id, "image_is_valid": is_own}

    def _read(self, wanted: list[int]) -> Iterator[tuple[int, bytes | None]]:
        contents = self.pairs.contents
        for shard, group in itertools.groupby(wanted, contents.shard_of):  # ids are in the order of the shards
            times = Counter(group)
            for image_id, data in read_images(contents, shard, dict.fromkeys(times, ())):
                yield from [(image_id, data)] * times[image_id]


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)  # the main process counts as one worker


class StreamLoader:
    """Load the batches of a :class:`~lightning_itm.ShardStream`, from any batch on.

    It wraps a DataLoader and is none, because Lightning does not trust the length of a DataLoader of an iterable dataset.
    The length of this loader is exact. So Lightning knows when to validate, and how far the progress bar is.

    Args:
        batches: The batches of this rank. The workers of the loader read them.
        position: A function that returns the epoch and how many of its batches are done. It is called for each new iterator.
        **options: Options of ``torch.utils.data.DataLoader``, such as ``num_workers``.

    Attributes:
        before_first: A function that is called before the first batch of each iterator is asked for. It may raise.
    """

    before_first: Callable[[], None] | None = None

    def __init__(self, batches: StreamedBatches, position: Callable[[], tuple[int, int]], **options: Any) -> None:
        self.batches, self.position = batches, position
        self.loader: DataLoader[Any] = DataLoader(batches, batch_size=None, **options)

    def __len__(self) -> int:
        of = self.batches
        return len(batch_sizes(len(of.stream), of.batch_size, drop_last=of.drop_last, world_size=of.world_size))

    def __iter__(self) -> Iterator[Any]:
        # A generator, so that no worker starts before the first batch: Lightning also makes iterators that it never uses.
        if self.before_first is not None:
            self.before_first()
        self.batches.position.copy_(torch.tensor(self.position()))
        yield from self.loader

    @property
    def _iterator(self) -> Any:
        """The iterator of the DataLoader, by which Lightning ends the workers after a fit."""
        return self.loader._iterator

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self.loader._iterator = value

    def state_dict(self) -> dict[str, Any]:
        """Return nothing, because the position is in the state of the data module."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing, because the data module is asked for the position."""
