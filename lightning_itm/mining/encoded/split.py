"""The embeddings of a set that is split over the ranks: each holds its own rows, in half precision."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lightning_itm.distributed import broadcast
from lightning_itm.mining.encoded.pairs import ReadablePairs, mean_of_texts

MOST_TILE_ROWS, LEAST_TILE_ROWS, NUM_TILES = 16_384, 16, 256
BLOCK_ROWS = {"cpu": 65_536}
BLOCK_ROWS_ELSEWHERE = 262_144
"""With 512 numbers of two bytes per row, a block takes 67 MB on a CPU, and 268 MB elsewhere."""


@dataclass(frozen=True)
class Division:
    """Say which rows of a set each rank holds: consecutive ones, and whole tiles.

    The tiles follow from the number of rows alone. What is computed tile by tile is then the same for any number of ranks,
    rounding included.

    Args:
        num_rows: Number of rows of the set.
        rank: The number of this process, from 0.
        world_size: The number of processes.

    Example:
        >>> from lightning_itm.mining.encoded import Division
        >>> Division(100, rank=1, world_size=2).tiles(1)
        [slice(48, 64, None), slice(64, 80, None), slice(80, 96, None), slice(96, 100, None)]
    """

    num_rows: int
    rank: int = 0
    world_size: int = 1

    @property
    def tile_rows(self) -> int:
        """Number of rows of each tile but the last. Small sets have small tiles, so that no rank is left without work."""
        return min(MOST_TILE_ROWS, max(LEAST_TILE_ROWS, -(-self.num_rows // NUM_TILES)))

    def start(self, rank: int) -> int:
        """Return the first row of a rank. That of a rank too many is the number of rows."""
        num_tiles = -(-self.num_rows // self.tile_rows)
        return min(self.num_rows, num_tiles * rank // self.world_size * self.tile_rows)

    @property
    def own(self) -> slice:
        """The rows of this rank."""
        return slice(self.start(self.rank), self.start(self.rank + 1))

    def tiles(self, rank: int) -> list[slice]:
        """Return the rows of each tile of a rank."""
        stop = self.start(rank + 1)
        starts = range(self.start(rank), stop, self.tile_rows)
        return [slice(start, min(start + self.tile_rows, stop)) for start in starts]

    def blocks(self, device: torch.device) -> Iterator[slice]:
        """Yield the rows of each block that goes to all ranks. Blocks follow from the number of rows and the device."""
        size = BLOCK_ROWS.get(device.type, BLOCK_ROWS_ELSEWHERE)
        for start in range(0, self.num_rows, size):
            yield slice(start, min(start + size, self.num_rows))


def rows_of_all_ranks(own: Tensor, division: Division, ids: Tensor) -> Tensor:
    """Bring rows that are split over the ranks together. Every rank must call it, with the same ids.

    Args:
        own: The rows of this rank, `(own rows, ...)`.
        division: Which rows these are.
        ids: int64 `(rows,)` in ascending order, on the CPU.

    Returns:
        `(rows, ...)`, the same on every rank.
    """
    rows = own.new_empty(len(ids), *own.shape[1:])
    starts = torch.tensor([division.start(rank) for rank in range(division.world_size + 1)])
    bounds = torch.searchsorted(ids, starts).tolist()
    for rank, (first, last) in enumerate(pairwise(bounds)):
        if first == last:
            continue
        part = rows[first:last]
        if rank == division.rank:
            torch.index_select(own, 0, (ids[first:last] - division.start(rank)).to(own.device), out=part)
        if division.world_size > 1:
            broadcast(part, rank)
    return rows


class SplitRows:
    """Hold the embeddings of one side of a set, each rank its own rows in float16, and send blocks of them to all ranks.

    Args:
        own: float16 `(own rows, dim)`, unit-norm but for rounding.
        division: Which rows these are.
    """

    def __init__(self, own: Tensor, division: Division) -> None:
        self.own, self.division = own, division

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the ids of each block, and its embeddings, float16 `(rows, dim)`. Every rank must take all of them."""
        for block in self.division.blocks(self.own.device):
            yield block, self.of_all_ranks(torch.arange(block.start, block.stop))

    def of_all_ranks(self, ids: Tensor) -> Tensor:
        """Return the embeddings of some ids, in ascending order, on every rank. Every rank must call it."""
        return rows_of_all_ranks(self.own, self.division, ids)

    def tile(self, tile: slice) -> Tensor:
        """Return the embeddings of a tile of this rank, a view."""
        start = self.division.own.start
        return self.own[tile.start - start : tile.stop - start]


@dataclass
class SplitPairs(ReadablePairs):
    """Hold the embeddings of a whole set, split over the ranks. What takes a few bytes per pair is whole on each of them.

    Args:
        images: The embeddings of the images.
        texts: The embeddings of the texts.
        text_image_id: int64 `(texts,)`, the image that each text belongs to.
        image_is_valid: bool `(images,)`, whether the image could be read. Afterwards false also where none of its texts could.
        text_is_valid: bool `(texts,)`, whether the text could be read. Afterwards false also where its image could not.
        caption_id: int64 `(texts,)`, the number of the caption of each text. Default: captions are not compared.
    """

    images: SplitRows
    texts: SplitRows
    text_image_id: Tensor
    image_is_valid: Tensor
    text_is_valid: Tensor
    caption_id: Tensor | None = None

    def __post_init__(self) -> None:
        self._leave_out_lonely()

    def positive(self) -> tuple[Tensor, Tensor]:
        """Return the similarity of the matching pairs, as that of :class:`EncodedPairs`. Every rank must call it."""
        division = self.texts.division
        owner = self.text_image_id[division.own]
        own = owner.new_zeros(len(owner), dtype=torch.float32)
        for block, images in self.images.blocks():
            there = ((owner >= block.start) & (owner < block.stop)).nonzero().squeeze(1)
            for rows in there.split(MOST_TILE_ROWS):
                of_rows = images[owner[rows] - block.start].float() * self.texts.own[rows].float()
                own[rows] = of_rows.sum(dim=1)
        of_text = rows_of_all_ranks(own, division, torch.arange(division.num_rows))
        # On the CPU, which adds in one order: the ranks must agree to the last bit.
        owner, is_valid = self.text_image_id.cpu(), self.text_is_valid.cpu()
        of_image = mean_of_texts(of_text.cpu(), owner, is_valid, len(self.image_is_valid))
        return of_image.to(of_text.device), of_text
