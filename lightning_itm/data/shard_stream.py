"""Shards read from front to back, in an order and a number of batches that are known beforehand."""

import itertools
import random
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from webdataset import shuffle as shuffled
from webdataset.tariterators import group_by_keys, tar_file_expander

from lightning_itm.data.batch import collate
from lightning_itm.data.hard_negatives import HardNegativePairs
from lightning_itm.data.pairs import UnreadablePairError
from lightning_itm.data.sampler import seeded
from lightning_itm.data.shard_index import ShardIndex
from lightning_itm.data.shards import ShardPairs
from lightning_itm.data.tar import IMAGE_ENDINGS, check_fetched, open_shard


class ShardStream(Dataset[Any]):
    """Read the shards of a set from front to back, for training where reading at random is slow or impossible.

    Each epoch puts the shards into another order, cuts the row of all their pairs into equal parts, one for each worker of
    each rank, and shuffles each part in a buffer. So every pair comes once (and as many as make the ranks equal come twice),
    all ranks have the same number of batches, and it is known beforehand, whatever the number of shards, ranks and workers.
    Where a part begins or ends within a shard, both of its readers read that shard.

    :class:`~lightning_itm.ImageTextDataModule` takes it as ``train_dataset``, and resumes it at any batch, with as many
    workers as before.

    Args:
        pairs: The shards.
        shuffle_buffer: Pairs among which a worker chooses the next one. It holds the bytes of their images. With several texts
            an image make it large: they enter it one after the other.
        resampled: Draw shards with replacement, so that an epoch does not cover the set; for sets so large that nobody sees
            all of it.
        pairs_per_epoch: Pairs an epoch, on all ranks; default: as many as there are. Only with ``resampled``.

    Raises:
        ValueError: A number that is not positive, or ``pairs_per_epoch`` without ``resampled``.
    """

    def __init__(
        self,
        pairs: ShardPairs,
        *,
        shuffle_buffer: int = 4096,
        resampled: bool = False,
        pairs_per_epoch: int | None = None,
    ) -> None:
        if not isinstance(pairs, ShardPairs):
            raise TypeError(
                f"Expected ShardPairs, got {type(pairs).__name__}. Write other pairs with `write_shards` first."
            )
        for name, value in (("shuffle_buffer", shuffle_buffer), ("pairs_per_epoch", pairs_per_epoch)):
            if value is not None and value < 1:
                raise ValueError(f"Expected `{name}` to be at least 1, got {value}.")
        if pairs_per_epoch is not None and not resampled:
            raise ValueError(f"Expected `resampled=True` with `pairs_per_epoch`, got {pairs_per_epoch} without it.")
        self.pairs, self.shuffle_buffer, self.resampled = pairs, shuffle_buffer, resampled
        self.num_pairs = pairs_per_epoch or len(pairs)
        self.negatives: HardNegativePairs | None = None  # where mined negatives come with the pairs
        self.order = pairs.text_image_id.argsort(stable=True)
        per_image = torch.bincount(pairs.text_image_id, minlength=len(pairs.images))
        before_image = torch.cat([per_image.new_zeros(1), per_image.cumsum(0)])
        self.bounds = before_image[pairs.contents.first].tolist()  # pairs before each shard, and all of them

    def __len__(self) -> int:
        return self.num_pairs

    def shard_order(self, seed: int, epoch: int) -> list[int]:
        """Return the shards in the order of an epoch, as many as fill it."""
        sizes = [end - start for start, end in zip(self.bounds, self.bounds[1:], strict=False)]
        with seeded(seed, epoch):
            if not self.resampled:
                return torch.randperm(len(sizes)).tolist()
            drawn: list[int] = []
            missing = self.num_pairs
            while missing > 0:
                drawn.append(int(torch.randint(len(sizes), ())))
                missing -= sizes[drawn[-1]]
            return drawn

    def parts(self, order: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the shards, and the texts of each, that lie between two places in the row of all pairs of an epoch."""
        place = 0
        for shard in order:
            low, high = self.bounds[shard], self.bounds[shard + 1]
            first, last = max(start - place, 0), min(stop - place, high - low)
            if first < last:
                yield shard, self.order[low + first : low + last]
            place += high - low

    def read(self, order: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, bytes | None]]:
        """Yield the texts of a part by number, each with the bytes of its image; None where they are no longer there."""
        for shard, text_ids in self.parts(order, start, stop):
            yield from self._read_shard(shard, text_ids)

    def load(self, text_id: int, data: bytes | None) -> dict[str, Any]:
        """Return a pair as training takes it, with its negatives where some were mined.

        Raises:
            UnreadablePairError: Its image does not open, or is no longer there.
        """
        image_id, text = int(self.pairs.text_image_id[text_id]), self.pairs.load_text(text_id)
        if data is None:
            raise UnreadablePairError(self.pairs.missing(image_id))
        image = self.pairs.load_data(image_id, data)
        sample = {"image": image, "text": text, "image_id": image_id, "text_id": text_id}
        return sample if self.negatives is None else self.negatives.with_negatives(sample)

    def _read_shard(self, shard: int, text_ids: Tensor) -> Iterator[tuple[int, bytes | None]]:
        texts_of: dict[int, list[int]] = {}
        for image_id, text_id in zip(self.pairs.text_image_id[text_ids].tolist(), text_ids.tolist(), strict=True):
            texts_of.setdefault(image_id, []).append(text_id)
        for image_id, data in read_images(self.pairs.contents, shard, texts_of):
            for text_id in texts_of[image_id]:
                yield text_id, data


def read_images(contents: ShardIndex, shard: int, image_ids: Iterable[int]) -> Iterator[tuple[int, bytes | None]]:
    """Yield images of one shard, by number, with their bytes; None where they are no longer there.

    Raises:
        FileNotFoundError: The shard is gone.
        OSError: It can't be fetched.
    """
    image_of, url = {contents.key[image_id]: image_id for image_id in image_ids}, contents.shards[shard]
    with open_shard(url) as file:
        files = tar_file_expander([{"url": url, "stream": file}], handler=_is_broken_off)
        for sample in group_by_keys(files):
            image_id = image_of.pop(sample["__key__"], None)
            if image_id is not None:
                yield image_id, next((sample[ending] for ending in IMAGE_ENDINGS if ending in sample), None)
            if not image_of:
                return  # the rest of the shard is another reader's
        check_fetched(file)
    for image_id in image_of.values():  # the shard is not what it was when it was indexed
        yield image_id, None


def _is_broken_off(error: Exception) -> bool:
    if not isinstance(error, tarfile.ReadError):
        raise error
    return True  # what is lost is seen by what does not come


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
            yield collate([next(pairs) for _ in range(size)])

    def _pairs(self, epoch: int, worker: int, share: Share, num_skipped: int) -> Iterator[dict[str, Any]]:
        """Yield as many pairs as the share has; a neighbour stands in for one that can't be used."""
        order = self.stream.shard_order(self.seed, epoch)
        order = order + order  # the row starts anew where ranks would be unequal
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

    def __init__(self, pairs: ShardPairs, *, rank: int, world_size: int) -> None:
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
            image_ids = list(group)
            found = read_images(contents, shard, sorted(set(image_ids)))
            for image_id, data in found:
                yield from [(image_id, data)] * image_ids.count(image_id)


class StreamLoader:
    """Batches of a :class:`ShardStream`, resumable at any of them.

    It is no DataLoader, but its length is exact: Lightning, which mistrusts the length of every iterable dataset, knows when
    to validate and how far the progress bar is.

    Args:
        batches: What the workers read.
        position: As for :class:`~lightning_itm.data.sampler.EpochSampler`.
        **options: Of the DataLoader.
    """

    def __init__(self, batches: StreamedBatches, position: Any, **options: Any) -> None:
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

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the position is in the datamodule's state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: the datamodule is asked for the position."""
