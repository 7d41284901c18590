"""Shards read from front to back, in an order and a number of batches that are known beforehand."""

import itertools
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset
from webdataset.tariterators import tar_file_expander

from lightning_itm.data.image import IMAGE_ENDINGS
from lightning_itm.data.shards.dataset import ShardDataset
from lightning_itm.data.shards.index import ShardIndex
from lightning_itm.data.shards.tar import check_fetched, group_samples, open_shard
from lightning_itm.randomness import seeded


class AddsNegatives(Protocol):
    """What adds mined negatives to a pair."""

    def with_negatives(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Return the pair with its negatives."""


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
        pairs: ShardDataset,
        *,
        shuffle_buffer: int = 4096,
        resampled: bool = False,
        pairs_per_epoch: int | None = None,
    ) -> None:
        if not isinstance(pairs, ShardDataset):
            raise TypeError(
                f"Expected a ShardDataset, got {type(pairs).__name__}. Write other pairs with `write_shards` first."
            )
        for name, value in (("shuffle_buffer", shuffle_buffer), ("pairs_per_epoch", pairs_per_epoch)):
            if value is not None and value < 1:
                raise ValueError(f"Expected `{name}` to be at least 1, got {value}.")
        if pairs_per_epoch is not None and not resampled:
            raise ValueError(f"Expected `resampled=True` with `pairs_per_epoch`, got {pairs_per_epoch} without it.")
        self.pairs, self.shuffle_buffer, self.resampled = pairs, shuffle_buffer, resampled
        self.num_pairs = pairs_per_epoch or len(pairs)
        self.negatives: AddsNegatives | None = None  # where mined negatives come with the pairs
        self.order = pairs.text_image_id.argsort(stable=True)
        per_image = torch.bincount(pairs.text_image_id, minlength=len(pairs.images))
        before_image = torch.cat([per_image.new_zeros(1), per_image.cumsum(0)])
        self.bounds = before_image[pairs.contents.first].tolist()  # pairs before each shard, and all of them

    def __len__(self) -> int:
        return self.num_pairs

    def settings(self) -> dict[str, Any]:
        """Return what the order of an epoch depends on, beside seed, ranks and workers."""
        return {
            "shuffle_buffer": self.shuffle_buffer,
            "resampled": self.resampled,
            "pairs_per_epoch": self.num_pairs,
            "pairs before each shard": self.bounds,
        }

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
        """Yield the shards, and the texts of each, that lie between two places in the row of all pairs of an epoch.

        The row starts anew at its end, where ranks would be unequal.
        """
        place = 0
        for shard in itertools.cycle(order):
            if place >= stop:
                return
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
        for key, sample in group_samples((entry["fname"], entry["data"]) for entry in files if entry):
            image_id = image_of.pop(key, None)
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
