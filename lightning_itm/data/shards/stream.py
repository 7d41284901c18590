"""The plan of an epoch over tar shards: their order, which pairs each worker reads, and how these are read.

A tar file is fast only from front to back. So an epoch is a row of shards in a random order, and a *part* of it is what one
worker reads, from one index in the row of all pairs to another. ``loader.py`` cuts the epoch into such parts.
"""

import itertools
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from webdataset.tariterators import tar_file_expander

from lightning_itm.data.image import IMAGE_ENDINGS
from lightning_itm.data.shards.captions import read_captions
from lightning_itm.data.shards.dataset import ShardDataset
from lightning_itm.data.shards.index import ShardIndex
from lightning_itm.data.shards.paths import check_present, fetched_again
from lightning_itm.data.shards.tar import check_fetched, group_samples, open_shard
from lightning_itm.randomness import seeded


class AddsNegatives(Protocol):
    """Whatever adds mined negatives to a pair, such as a :class:`~lightning_itm.HardNegativeDataset`."""

    def with_negatives(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Return the pair with its negatives."""


class ShardStream:
    """Read the shards of a set from front to back, where reading images at random is slow or impossible.

    Give it to :class:`~lightning_itm.ImageTextDataModule` as ``train_dataset``. It is no Dataset: it has no item by index and
    can't be iterated. It is the plan by which the workers of the data module read the shards.

    Each epoch puts the shards into another order. The row of all their pairs is cut into equal parts, one for each worker of
    each rank, and each worker shuffles its part in a buffer. So every pair comes once per epoch. All ranks have the same
    number of batches, and this number is known beforehand. If the pairs can't be divided evenly, a few come twice. Where a
    part begins or ends within a shard, two workers read that shard. A run resumes at any batch, with as many workers as
    before.

    Args:
        pairs: The shards that are read, local or remote.
        shuffle_buffer: Number of pairs among which a worker chooses the next one. It holds the bytes of their images. The
            texts of an image enter it one after the other, so make it larger where there are many texts per image.
        resampled: Draw shards with replacement, so that an epoch does not cover the set. For sets that are too large to be
            read to their end.
        pairs_per_epoch: Number of pairs per epoch on all ranks together, such as 1,000,000. Only with ``resampled``. Default:
            as many as the set has.

    Raises:
        TypeError: if ``pairs`` is no :class:`~lightning_itm.ShardDataset`.
        ValueError: if a number is not positive, or if ``pairs_per_epoch`` is given without ``resampled``.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> from lightning_itm import ImageTextDataModule, ImageTextDataset, ShardDataset, ShardStream, write_shards
        >>> images, texts = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")], ["red", "blue"]
        >>> with TemporaryDirectory() as folder:
        ...     _ = write_shards(ImageTextDataset(images, texts), folder)
        ...     data = ImageTextDataModule(ShardStream(ShardDataset(folder)), batch_size=2, num_workers=0)
        ...     sorted(text for batch in data.train_dataloader() for text in batch["text"])
        ['blue', 'red']
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
        self.negatives: AddsNegatives | None = None  # set by the mining callback
        # Images are numbered in the order of the shards: sorted by image, the texts of one shard stand side by side.
        self.order = pairs.text_image_id.argsort(stable=True)  # (texts,)
        per_image = torch.bincount(pairs.text_image_id, minlength=len(pairs.images))  # (images,)
        before_image = torch.cat([per_image.new_zeros(1), per_image.cumsum(0)])  # (images + 1,)
        self.bounds = before_image[pairs.contents.first].tolist()  # pairs before each shard, and all of them

    def __len__(self) -> int:
        return self.num_pairs

    def settings(self) -> dict[str, Any]:
        """Return the settings that change the order of an epoch. Seed, ranks and workers change it, too."""
        return {  # stored in checkpoints, under these names
            "shuffle_buffer": self.shuffle_buffer,
            "resampled": self.resampled,
            "pairs_per_epoch": self.num_pairs,
            "pairs before each shard": self.bounds,
        }

    def shard_order(self, seed: int, epoch: int) -> list[int]:
        """Return the shards in the order in which an epoch reads them. Every rank and worker computes the same.

        Args:
            seed: The seed of the data module.
            epoch: The epoch, from 0.
        """
        sizes = [end - start for start, end in zip(self.bounds, self.bounds[1:], strict=False)]
        with seeded(seed, epoch):
            if not self.resampled:
                return torch.randperm(len(sizes)).tolist()
            drawn: list[int] = []
            missing = self.num_pairs
            while missing > 0:  # it ends, because at least one shard has a pair
                drawn.append(int(torch.randint(len(sizes), ())))
                missing -= sizes[drawn[-1]]
            return drawn

    def parts(self, order: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the shards that have pairs from index ``start`` to ``stop`` of an epoch, each with the ids of these texts.

        Args:
            order: The shards of the epoch, from :meth:`shard_order`.
            start: The first index in the row of all pairs of the epoch.
            stop: The index after the last one. It may be more than there are pairs. Then the row starts anew.
        """
        index = 0  # of the first pair of the shard, in the row of all pairs
        for shard in itertools.cycle(order):
            if index >= stop:
                return
            low, high = self.bounds[shard], self.bounds[shard + 1]
            first, last = max(start - index, 0), min(stop - index, high - low)
            if first < last:
                yield shard, self.order[low + first : low + last]
            index += high - low

    def read(self, order: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, bytes | None]]:
        """Yield the ids of the texts of :meth:`parts`, each with the bytes of its image.

        The bytes are ``None`` if the image is no longer in its shard.
        """
        for shard, text_ids in self.parts(order, start, stop):
            yield from self._read_shard(shard, text_ids)

    def load(self, text_id: int, data: bytes | None) -> dict[str, Any]:
        """Return a pair as training takes it, with its negatives if there are some.

        Args:
            text_id: The id of the text.
            data: The bytes of its image, as :meth:`read` yields them.

        Raises:
            UnreadablePairError: if the text is empty, or if the image does not open or is no longer in its shard.
        """
        text, ids = self.pairs.load_text(text_id), self.pairs.ids(text_id)
        drawn = self.pairs.draw_hard_captions(text_id, text)
        sample = {"image": self.pairs.load_data(ids["image_id"], data), "text": text, **ids, **drawn}
        return sample if self.negatives is None else self.negatives.with_negatives(sample)

    def _read_shard(self, shard: int, text_ids: Tensor) -> Iterator[tuple[int, bytes | None]]:
        texts_of: dict[int, list[int]] = {}
        for image_id, text_id in zip(self.pairs.text_image_id[text_ids].tolist(), text_ids.tolist(), strict=True):
            texts_of.setdefault(image_id, []).append(text_id)
        for image_id, data in read_images(self.pairs.contents, shard, texts_of):  # each image is read once
            for text_id in texts_of[image_id]:
                yield text_id, data


def read_images(
    contents: ShardIndex, shard: int, texts_of: Mapping[int, Sequence[int]]
) -> Iterator[tuple[int, bytes | None]]:
    """Read images of one shard from front to back.

    Args:
        contents: The index of the shards.
        shard: Which shard is read, as an index of ``contents.shards``.
        texts_of: The images that are wanted, each with the texts that it comes with. All must be of this shard.

    Yields:
        The id of each image, and its bytes. The bytes are ``None`` if the image is no longer in the shard.

    Raises:
        FileNotFoundError: if the shard no longer exists.
        OSError: if the shard can't be fetched.
        RuntimeError: if it has changed since it was indexed.
    """
    check_present(contents.shards, shard)
    contents.check_unchanged(shard)
    image_of, url = {contents.key[image_id]: image_id for image_id in texts_of}, contents.shards[shard]
    # Each image leaves `image_of` when it is yielded, so that a second try yields the others.
    for image_id, data, captions in fetched_again(url, lambda: _read_samples(url, image_of)):
        contents.check_sample(image_id, data, texts_of[image_id], captions)
        yield image_id, data
    for image_id in image_of.values():  # the shard has changed since it was indexed
        yield image_id, None


def _read_samples(url: str, image_of: dict[str, int]) -> Iterator[tuple[int, bytes, list[str]]]:
    with open_shard(url) as file:
        files = tar_file_expander([{"url": url, "stream": file}], handler=_is_broken_off)
        for key, sample in group_samples((entry["fname"], entry["data"]) for entry in files if entry):
            data = next((sample[ending] for ending in IMAGE_ENDINGS if ending in sample), None)
            # Without its image, the sample may be the one within which the transfer broke off.
            if key in image_of and data is not None:
                yield image_of.pop(key), data, read_captions(key, sample)[0]
            if not image_of:
                return  # the rest of the shard belongs to other workers
        check_fetched(file)


def _is_broken_off(error: Exception) -> bool:
    if not isinstance(error, tarfile.ReadError):
        raise error
    return True  # go on without it: what is lost shows, because its image never comes
