"""Search among the keys that an index finds near each anchor. Which these are is approximate, their scores are not."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_itm.functional import TopK
from lightning_itm.functional.top_k_search.candidates import candidate_products, hardest_first
from lightning_itm.functional.top_k_search.top_k import score_ceiling
from lightning_itm.mining.search.faiss_index import FaissIndex

NUM_RECALLED_ANCHORS = 1_000
ENTRIES_AT_ONCE = 1 << 22
"""Neighbours that are compared at once. With their scores and masks they take about 100 MB."""
NUM_SPARE = 64


class IndexedKeys:
    """Hold keys and an index of them, and search like :func:`~lightning_itm.functional.top_k_negatives`.

    The index is asked for more neighbours than are wanted. What may be no negative is left out of these, and the rest is
    compared in float32, as the exact search compares. An anchor for which too few remain is asked for again, with four times
    as many neighbours.

    Args:
        keys: Unit-norm embeddings of what is searched, `(keys, dim)`, the same on every rank.
        faiss_index: As :class:`~lightning_itm.mining.search.faiss_index.FaissIndex` takes it.
    """

    def __init__(self, keys: Tensor, faiss_index: str | None = None) -> None:
        self.keys = keys.float().contiguous()
        self.index = FaissIndex(self.keys, faiss_index) if len(keys) else None

    def top_k_negatives(
        self,
        anchors: Tensor,
        k: int,
        *,
        anchor_id: Tensor,
        key_id: Tensor,
        anchor_captions: Tensor | None = None,
        key_captions: Tensor | None = None,
        positive: Tensor | None = None,
        rank_min: int = 0,
        **limits: float | None,
    ) -> TopK:
        """Return the hardest negatives of each anchor among those that the index finds.

        The arguments are those of :func:`~lightning_itm.functional.top_k_negatives`.
        """
        anchors, wanted = anchors.float().contiguous(), k + rank_min
        scores = anchors.new_full((len(anchors), wanted), -torch.inf)
        index = anchor_id.new_full((len(anchors), wanted), -1, dtype=torch.int64)
        if self.index is None:
            return TopK(scores[:, :k], index[:, :k])
        limit = score_ceiling(positive, **limits)
        limit = None if limit is None else limit.to(anchors.device).expand(len(anchors))
        asking = _Anchors(anchors, anchor_id, anchor_captions, limit)
        remaining, num = torch.arange(len(anchors), device=anchors.device), 2 * wanted + NUM_SPARE
        while len(remaining):
            num, again = min(num, self.index.most), []
            for rows in remaining.split(max(1, ENTRIES_AT_ONCE // num)):
                found, may_have_more = self._find(self.index, asking.of(rows), num, key_id, key_captions)
                columns = min(wanted, num)
                scores[rows, :columns], index[rows, :columns] = found.scores[:, :columns], found.index[:, :columns]
                again.append(rows[may_have_more & (scores[rows, -1] == -torch.inf)])
            remaining = torch.cat(again) if num < self.index.most else remaining[:0]
            num *= 4
        index = index.masked_fill(scores == -torch.inf, -1)
        return TopK(scores[:, rank_min:], index[:, rank_min:])

    def _find(
        self, index: FaissIndex, anchors: "_Anchors", num: int, key_id: Tensor, key_captions: Tensor | None
    ) -> tuple[TopK, Tensor]:
        """Return all negatives among ``num`` neighbours, and whether the index may have more neighbours."""
        near = index.nearest(anchors.embeddings, num)
        may_have_more = near[:, -1] >= 0
        near = near.sort(dim=1).values  # (anchors, num), so that ties are in the order of the keys
        is_none, near = near < 0, near.clamp_min(0)
        is_none |= anchors.image_id[:, None] == key_id[near]
        if anchors.captions is not None and key_captions is not None:
            is_none |= _shares_caption(anchors.captions, key_captions, near)
        scores = candidate_products(anchors.embeddings, self.keys, near)
        if anchors.limit is not None:
            is_none |= scores > anchors.limit[:, None]
        return hardest_first(scores.masked_fill(is_none, -torch.inf), near), may_have_more


class _Anchors(NamedTuple):
    embeddings: Tensor
    image_id: Tensor
    captions: Tensor | None
    limit: Tensor | None
    """The highest score that the guards let pass, `(anchors,)`."""

    def of(self, rows: Tensor) -> "_Anchors":
        return _Anchors(*(None if part is None else part[rows] for part in self))  # type: ignore[arg-type]


def _shares_caption(anchor_captions: Tensor, key_captions: Tensor, near: Tensor) -> Tensor:
    """Tell which of the keys near an anchor, rows `(anchors, near)`, have one of its captions."""
    shared = torch.zeros_like(near, dtype=torch.bool)
    for of_key in key_captions.T:
        of_near = of_key[near]  # (anchors, near)
        for of_anchor in anchor_captions.T:
            shared |= (of_anchor[:, None] == of_near) & (of_anchor >= 0)[:, None]
    return shared


def sampled_valid(is_valid: Tensor) -> Tensor:
    """Return the rows of at most 1,000 anchors that are valid, drawn with a fixed seed, in ascending order."""
    valid = is_valid.nonzero().squeeze(1)
    drawn = torch.randperm(len(valid), generator=torch.Generator().manual_seed(0))[:NUM_RECALLED_ANCHORS]
    return valid[drawn.sort().values.to(valid.device)]


def shared_fraction(found: Tensor, expected: Tensor) -> float:
    """Return which fraction of the expected ids was found. It is 1 where none is expected.

    Args:
        found: Ids `(anchors, k)`, −1 where there is none. No id comes twice in a row.
        expected: Ids that the exact search mined, `(anchors, k)`, in any order.

    Example:
        >>> import torch
        >>> from lightning_itm.mining.search.approximate import shared_fraction
        >>> shared_fraction(torch.tensor([[4, 7, -1]]), torch.tensor([[7, 5, -1]]))
        0.5
    """
    both = torch.cat([found, expected], dim=1).sort(dim=1).values
    num_found = int(((both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)).sum())
    num_expected = int((expected >= 0).sum())
    return num_found / num_expected if num_expected else 1.0
