"""Search where the embeddings are split over the ranks: blocks of keys go to all of them, and each keeps the best so far."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_itm.distributed import broadcast
from lightning_itm.functional import TopK, top_k_negatives
from lightning_itm.functional.top_k_search.candidates import hardest_first
from lightning_itm.mining.encoded import SplitPairs, SplitRows
from lightning_itm.mining.search.whole import has_guards, mean_gap, rejected_by_guards, sampled_anchors

ROUND_BYTES = 1 << 30
"""What the best so far of the anchors of one round may take on a rank. More would need fewer rounds of the keys."""

Write = Callable[[str, slice, TopK], None]


class _Side(NamedTuple):
    """All images, or all texts, of a set. Only the embeddings are split."""

    name: str
    rows: SplitRows
    is_valid: Tensor
    image_id: Tensor
    captions: Tensor | None
    """`(rows, captions of a row)`, filled up with −1."""

    def options(self, role: str, rows: slice | Tensor) -> dict[str, Any]:
        """Return what ``top_k_negatives`` takes for some rows beside the embeddings. ``role`` is "anchor" or "key"."""
        captions = None if self.captions is None else self.captions[rows]
        return {f"{role}_id": self.image_id[rows], f"{role}_captions": captions}


class _Anchors(NamedTuple):
    embeddings: Tensor
    options: dict[str, Any]
    """Those of ``top_k_negatives`` that are theirs."""


def search_split_pairs(
    pairs: SplitPairs,
    texts_per_image: int,
    images_per_text: int,
    write: Write,
    *,
    with_scores: bool = False,
    is_shown: bool = False,
    **guards: Any,
) -> tuple[float, float]:
    """Search as :func:`~lightning_itm.mining.find_negatives` does, and hand out what was found in parts.

    Every rank must call it. The result is exact for the embeddings as they are stored, and the same for any number of ranks.

    Args:
        pairs: The embeddings, of which each rank holds its own.
        texts_per_image: Most texts that are kept per image, such as 300.
        images_per_text: Most images that are kept per text, such as 60.
        write: Called on every rank for each part of the table, with ``"texts"`` (of images) or ``"images"`` (of texts), the
            anchors, and their negatives. All parts together are the whole table. Ids are int32.
        with_scores: Hand out the similarities of all negatives. False: only that of the hardest, `(anchors, 1)`.
        is_shown: Draw a progress bar.
        **guards: As :func:`~lightning_itm.mining.find_negatives` takes them.

    Returns:
        The gap and the fraction of rejected candidates, as :class:`~lightning_itm.mining.MinedNegatives` has them.
    """
    of_image, of_text = pairs.positive()
    image_id = torch.arange(len(of_image), device=of_image.device)
    image_captions, text_captions = pairs.captions()
    images = _Side("images", pairs.images, pairs.image_is_valid, image_id, image_captions)
    texts = _Side("texts", pairs.texts, pairs.text_is_valid, pairs.text_image_id, text_captions)
    options = {"write": write, "with_scores": with_scores, "is_shown": is_shown, **guards}
    hardest_texts, rejected_texts = _search(images, texts, of_image, texts_per_image, **options)
    hardest_images, rejected_images = _search(texts, images, of_text, images_per_text, **options)
    gap = mean_gap(of_image - hardest_texts, of_text - hardest_images)
    return gap, (rejected_texts + rejected_images) / 2


def _search(
    anchors: _Side,
    keys: _Side,
    positive: Tensor,
    k: int,
    *,
    write: Write,
    with_scores: bool,
    is_shown: bool,
    **guards: Any,
) -> tuple[Tensor, float]:
    division, hardest = anchors.rows.division, torch.empty_like(positive)
    ranks, rank_min = range(division.world_size), guards.get("rank_min", 0)
    limits = {name: limit for name, limit in guards.items() if name != "rank_min"}
    per_round = max(1, ROUND_BYTES // (8 * (k + rank_min) * division.tile_rows))
    # A rank without tiles in the last round still sends and takes the blocks.
    num_rounds = -(-max(len(division.tiles(rank)) for rank in ranks) // per_round)
    for first in tqdm(range(0, num_rounds * per_round, per_round), "Mining: search", leave=False, disable=not is_shown):
        tiles = [division.tiles(rank)[first : first + per_round] for rank in ranks]
        own = [
            _Anchors(anchors.rows.tile(tile), {**anchors.options("anchor", tile), "positive": positive[tile], **limits})
            for tile in tiles[division.rank]
        ]
        found = iter(_running_top_k(own, keys, k, rank_min))
        for rank, tile in ((number, tile) for number in ranks for tile in tiles[number]):
            part = next(found) if rank == division.rank else None
            shape = tile.stop - tile.start, k
            part = _of_rank(rank, part, shape, anchors.is_valid[tile], num_scores=k if with_scores else 1)
            hardest[tile] = part.scores[:, 0]
            write(keys.name, tile, part)
    return hardest, _rejected_fraction(anchors, keys, positive, k, **guards)


def _running_top_k(anchors: list[_Anchors], keys: _Side, k: int, rank_min: int = 0) -> list[TopK]:
    """Search all keys for each group of anchors. Every rank must call it, with anchors of its own."""
    best: list[TopK] = []
    for block, embeddings in keys.rows.blocks():
        kept = keys.is_valid[block].nonzero().squeeze(1)  # what can't be read is left out
        rows = embeddings.float() if len(kept) == len(embeddings) else embeddings[kept].float()
        del embeddings  # while the next block comes, this one must not be held twice
        kept = kept + block.start  # ids
        options, is_first = keys.options("key", kept), block.start == 0
        for number, group in enumerate(anchors):
            scores, index = top_k_negatives(group.embeddings, rows, k + rank_min, **group.options, **options)
            index = torch.where(index < 0, -1, kept[index.clamp_min(0)]) if len(kept) else index
            found = TopK(scores, index.int())
            if is_first:
                best.append(found)
            else:
                best[number] = _better(best[number], found)
        del rows
    # `rank_min` leaves out the hardest of all, not those of each block.
    return [TopK(scores[:, rank_min:], index[:, rank_min:]) for scores, index in best]


def _better(best: TopK, found: TopK) -> TopK:
    """Return the hardest of both. Among equal ones those of the earlier blocks are first, which have the lower ids."""
    k = best.scores.shape[1]
    both = hardest_first(torch.cat([best.scores, found.scores], dim=1), torch.cat([best.index, found.index], dim=1))
    return TopK(both.scores[:, :k].clone(), both.index[:, :k].clone())  # no views, which would keep all


def _of_rank(rank: int, part: TopK | None, shape: tuple[int, int], is_valid: Tensor, *, num_scores: int) -> TopK:
    """Return on every rank what one rank found, with empty rows for anchors that are not valid."""
    if part is None:
        scores = torch.empty(shape[0], num_scores, dtype=torch.float32, device=is_valid.device)
        index = torch.empty(shape, dtype=torch.int32, device=is_valid.device)
    else:
        scores = part.scores[:, :num_scores].masked_fill(~is_valid[:, None], -torch.inf).contiguous()
        index = part.index.masked_fill(~is_valid[:, None], -1).contiguous()
    broadcast(scores, rank)
    broadcast(index, rank)
    return TopK(scores, index)


def _rejected_fraction(anchors: _Side, keys: _Side, positive: Tensor, k: int, **guards: Any) -> float:
    """Measure on some anchors which fraction of the hardest ``k`` the guards reject. Each rank does the same."""
    if not has_guards(**guards):
        return 0.0
    some = torch.arange(len(positive))[sampled_anchors(len(positive))]
    group = _Anchors(anchors.rows.of_all_ranks(some), anchors.options("anchor", some.to(positive.device)))
    (free,) = _running_top_k([group], keys, k)
    return rejected_by_guards(free.scores, positive[some.to(positive.device)], **guards)
