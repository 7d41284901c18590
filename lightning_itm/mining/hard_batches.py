"""Compose batches in which pairs are hard for each other."""

from collections.abc import Iterator
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_itm.captions import is_shared
from lightning_itm.data.resumable_loader import random_order

GROUP_STREAM = 0x5EED
"""Added to the seed, so that groups are shuffled with other numbers than pairs."""


class HardBatches(NamedTuple):
    """Say in which order an epoch reads the pairs, and which of them belong together.

    Attributes:
        order: int32 `(pairs,)`, the number of the pair at each position. Each pair comes once.
        group: int32 `(pairs,)`, the group of the pair at each position. The pairs of a group stand side by side.
    """

    order: Tensor
    group: Tensor

    def grouped_fraction(self) -> float:
        """Return the fraction of the pairs that share their group with another pair, in [0, 1]."""
        sizes = torch.bincount(self.group)  # (groups,)
        return float(sizes[sizes > 1].sum() / len(self.group))


def compose_batches(
    texts: Tensor,
    images: Tensor,
    text_image_id: Tensor,
    *,
    group_size: int,
    batch_size: int,
    caption_id: Tensor | None = None,
    seed: int = 0,
    epoch: int = 0,
) -> HardBatches:
    """Compose an epoch in which pairs that are hard for each other share a batch.

    In plain terms:

    1. Take a random unused pair and the hardest unused pairs around it: in turn a text that is hard for its image, and an
       image that is hard for its text. Together they are a group of ``group_size``.
    2. Go on until each pair is in a group. Where too few neighbours are left, a group is smaller.
    3. Put smaller groups together to the size of a full one, shuffle all, and fill one batch after the other.

    So each pair comes once per epoch, a batch holds whole groups, and no group holds two pairs of one image, or a text that
    equals a caption of another image of the group. A pair that a guard left out of the table joins no group. The result is a
    function of the arguments, the same on every rank.

    Args:
        texts: Integers `(images, texts_per_image)`, the hardest texts of each image first, −1 where there is none. The number
            of a text is that of its pair.
        images: Integers `(pairs, images_per_text)`, the hardest images of each text first, −1 where there is none.
        text_image_id: int64 `(pairs,)`, the image that each text belongs to.
        group_size: Number of pairs that are hard for each other, typically 4. Larger groups are harder. 1 gives the random
            order of :func:`~lightning_itm.data.random_order`.
        batch_size: Number of pairs per batch on all ranks together, a multiple of ``group_size``.
        caption_id: int64 `(pairs,)`, the number of the caption of each text. Default: captions are not compared.
        seed: Another seed gives another order.
        epoch: The epoch, from 0. Each has an order of its own.

    Raises:
        ValueError: if groups do not fit into batches, if there are fewer pairs than a batch has, or if the shapes do not fit.

    Example:
        >>> import torch
        >>> from lightning_itm.mining import compose_batches
        >>> ids = torch.arange(6)  # six images with one text each: 0 and 3, 1 and 4, 2 and 5 are hard for each other
        >>> hardest = ((ids + 3) % 6)[:, None]
        >>> compose_batches(hardest, hardest, ids, group_size=2, batch_size=2).order.view(3, 2).sort().values.tolist()
        [[2, 5], [0, 3], [1, 4]]

    References:
        Byun et al., *GRIT-VLP: Grouped Mini-batch Sampling for Efficient Vision and Language Pre-training*, ECCV 2022,
        arXiv 2208.04060. There, similar pairs within a queue share a batch. Here they come from the whole training set.
    """
    num_pairs = len(text_image_id)
    check_group_size(group_size, batch_size, num_pairs)
    if len(images) != num_pairs or len(texts) <= int(text_image_id.max()):
        raise ValueError(
            f"Expected rows for {int(text_image_id.max()) + 1} images and {num_pairs} texts, got {len(texts)} and "
            f"{len(images)}. `texts` has a row per image, `images` has one per text."
        )
    visited = random_order(num_pairs, seed, epoch)
    if group_size == 1 or not ((texts >= 0).any() or (images >= 0).any()):
        return HardBatches(visited.int(), torch.arange(num_pairs, dtype=torch.int32))
    groups = _Neighbours(texts, images, text_image_id, visited, caption_id).groups(group_size)
    blocks = _blocks(groups, group_size)
    # Blocks are made from the full groups to the smallest, so they are shuffled. One that is not full comes last.
    num_full = num_pairs // group_size
    shuffled = [*random_order(num_full, seed + GROUP_STREAM, epoch).tolist(), *range(num_full, len(blocks))]
    in_order = [group for number in shuffled for group in blocks[number]]
    sizes = torch.tensor([len(group) for group in in_order])  # (groups,)
    order = torch.tensor([pair for group in in_order for pair in group], dtype=torch.int32)
    return HardBatches(order, torch.arange(len(in_order), dtype=torch.int32).repeat_interleave(sizes))


def check_group_size(group_size: int, batch_size: int, num_pairs: int) -> None:
    """Raise if batches can't be filled with whole groups.

    Args:
        group_size: Number of pairs that are hard for each other.
        batch_size: Number of pairs per batch on all ranks together.
        num_pairs: Number of pairs of the set.

    Raises:
        ValueError: if one of them is too small, or if ``batch_size`` is no multiple of ``group_size``.
    """
    if group_size < 1:
        raise ValueError(f"Expected `group_size` to be at least 1, got {group_size}. 1 gives a random order.")
    if batch_size % group_size:
        divisors = [size for size in range(1, batch_size + 1) if batch_size % size == 0]
        raise ValueError(
            f"Expected `group_size` to divide {batch_size}, the pairs per batch on all ranks together, got {group_size}. "
            f"Choose one of {divisors}, or another `batch_size`."
        )
    if num_pairs < batch_size:
        raise ValueError(
            f"Expected at least one batch of {batch_size} pairs on all ranks together, got {num_pairs} pairs. Lower "
            "`batch_size`: where all pairs share one batch, there is nothing to compose."
        )


class _Neighbours:
    """Walk over pairs, and take each pair's hardest unused neighbours."""

    def __init__(
        self, texts: Tensor, images: Tensor, text_image_id: Tensor, visited: Tensor, caption_id: Tensor | None
    ) -> None:
        self.visited, self.texts, self.images = visited.tolist(), texts.numpy(), images.numpy()
        self.image_of = text_image_id.tolist()
        # The texts of an image side by side, in the random order: of an image that is a neighbour, the first unused is taken.
        self.texts_of_images: list[int] = visited[text_image_id[visited].argsort(stable=True)].tolist()
        self.num_left = torch.bincount(text_image_id, minlength=len(texts)).tolist()
        self.next_text = [0, *torch.tensor(self.num_left).cumsum(0).tolist()]
        # Each flag twice in one memory: a bytearray is fast for one pair, an array for a row of the table.
        self.is_free, self.has_free = bytearray(b"\1" * len(visited)), bytearray(b"\1" * len(texts))
        self.free_pairs, self.free_images = np.frombuffer(self.is_free, bool), np.frombuffer(self.has_free, bool)
        self.captions = _Captions(caption_id, text_image_id)

    def groups(self, group_size: int) -> Iterator[list[int]]:
        """Yield groups of pairs, until each pair was in one."""
        for pair in self.visited:
            if self.is_free[pair]:
                group, taken = [], set()
                self.captions.clear()
                for other in self._around(pair):
                    image = self.image_of[other]
                    if self.is_free[other] and image not in taken and self.captions.takes(other, image):
                        self._use(other)
                        group.append(other)
                        taken.add(image)
                        if len(group) == group_size:
                            break
                yield group

    def _around(self, pair: int) -> Iterator[int]:
        """Yield a pair and its neighbours, the hardest first: in turn a text of its image and an image of its text."""
        yield pair
        texts, images = self.texts[self.image_of[pair]], self.images[pair]
        texts, images = texts[texts >= 0], images[images >= 0]
        texts, images = texts[self.free_pairs[texts]], images[self.free_images[images]]
        for text, image in zip_longest(texts.tolist(), images.tolist(), fillvalue=-1):
            if text >= 0:
                yield text
            if image >= 0 and self.has_free[image]:
                yield self._unused_text(image)

    def _unused_text(self, image: int) -> int:
        while not self.is_free[self.texts_of_images[self.next_text[image]]]:
            self.next_text[image] += 1
        text: int = self.texts_of_images[self.next_text[image]]
        return text

    def _use(self, pair: int) -> None:
        image = self.image_of[pair]
        self.is_free[pair] = 0
        self.num_left[image] -= 1
        self.has_free[image] = self.num_left[image] > 0


class _Captions:
    """Tell which pairs may join a group: no text of it may be a caption of the pair's image, nor its text one of theirs."""

    def __init__(self, caption_id: Tensor | None, text_image_id: Tensor) -> None:
        caption_id = torch.full_like(text_image_id, -1) if caption_id is None else caption_id
        shared = is_shared(caption_id, text_image_id)
        self.of_text: list[int] = caption_id.masked_fill(~shared, -1).tolist()  # −1 where no other image has it
        self.of_image: dict[int, set[int]] = {}  # of the images that share captions alone
        for image, caption in zip(text_image_id[shared].tolist(), caption_id[shared].tolist(), strict=True):
            self.of_image.setdefault(image, set()).add(caption)
        self.clear()

    def clear(self) -> None:
        """Begin a group."""
        self.texts: set[int] = set()
        self.images: set[int] = set()

    def takes(self, pair: int, image: int) -> bool:
        """Return whether a pair may join the group. If so, it has joined."""
        caption, own = self.of_text[pair], self.of_image.get(image)
        if own is None:
            return True
        if caption in self.images or not own.isdisjoint(self.texts):
            return False
        self.images |= own
        if caption >= 0:
            self.texts.add(caption)
        return True


def _blocks(groups: Iterator[list[int]], block_size: int) -> list[list[list[int]]]:
    """Put groups together to blocks of one size. What is left over is the last block."""
    of_size: list[list[list[int]]] = [[] for _ in range(block_size + 1)]  # groups by their size
    for group in groups:
        of_size[len(group)].append(group)
    blocks = []
    while any(of_size):
        block: list[list[int]] = []
        gap = block_size
        while gap and any(of_size):
            size = next((size for size in range(gap, 0, -1) if of_size[size]), 0)
            if size == 0:
                _cut_one(of_size, gap)
                size = gap
            block.append(of_size[size].pop())
            gap -= size
        blocks.append(block)
    return blocks


def _cut_one(of_size: list[list[list[int]]], size: int) -> None:
    """Make a group of this size from a larger one, where there is no smaller one."""
    larger = next(groups for groups in of_size[size + 1 :] if groups)
    group = larger.pop()
    of_size[size].append(group[:size])
    # Each is hard for the first pair of the group, and perhaps not for each other.
    of_size[1] += [[pair] for pair in group[size:]]
