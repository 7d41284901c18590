"""Ranks and recall at K, without a sort and without the whole similarity matrix."""

import functools
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_itm.functional.precision import full_precision_products
from lightning_itm.functional.similarity import shares_caption


def retrieval_rank(
    query: Float[Tensor, "queries dim"],
    key: Float[Tensor, "keys dim"],
    *,
    query_id: Int[Tensor, " queries"],
    key_id: Int[Tensor, " keys"],
    query_captions: Int[Tensor, "queries captions_of_query"] | None = None,
    key_captions: Int[Tensor, "keys captions_of_key"] | None = None,
    chunk_elements: int = 1 << 22,
) -> Int[Tensor, " queries"]:
    """Count the wrong keys that score at least as high as each query's best right key.

    Two images and four texts, the texts of image 0 first. Image 0 finds a text of its own on top (rank 0, as its other text
    is no error), image 1 has one wrong text that ties with its best, and a tie counts against the model (rank 1)::

        similarity   0.9  0.2 | 0.5  0.1        rank 0
                     0.1  0.6 | 0.6  0.3        rank 1

    Scores are those of float64 where the device has it, because float32 products of equal rows can differ by their place in
    the matrix, and a collapsed model would win by rounding. A score that is not a number counts against the model.

    Args:
        query: Embeddings of the queries. Scale them to unit norm if cosine similarity is meant.
        key: Embeddings of what is searched, with the same norm.
        query_id: The image each query belongs to.
        key_id: The image each key belongs to. A key is right if it belongs to the query's image.
        query_captions: The numbers of the captions of each query, filled up with −1. Default: captions are not compared.
        key_captions: The numbers of the captions of each key. A key is right, too, if it shares a caption with the query.
        chunk_elements: How many scores may exist at once. Lower it where memory is short.

    Returns:
        Ranks from 0. A query without any right key has the number of keys as its rank.

    Example:
        >>> import torch
        >>> from lightning_itm.functional import retrieval_rank
        >>> eye, ids = torch.eye(3), torch.arange(3)
        >>> retrieval_rank(eye, eye, query_id=ids, key_id=ids)
        tensor([0, 0, 0])
    """
    if query_captions is None or key_captions is None:
        return _ranks(query, key, query_id, key_id, both=False, chunk_elements=chunk_elements)[0]
    dtype = torch.float32 if query.device.type == "mps" else torch.float64
    key, rows = key.to(dtype), max(1, chunk_elements // max(1, len(key)))
    ranks = []
    for part in torch.arange(len(query), device=query.device).split(rows):
        right = (query_id[part, None] == key_id) | shares_caption(query_captions[part], key_captions)
        ranks.append(_rank_of_rows(query[part].to(dtype) @ key.T, right))
    return torch.cat(ranks)


def retrieval_ranks(
    query: Float[Tensor, "queries dim"],
    key: Float[Tensor, "keys dim"],
    *,
    query_id: Int[Tensor, " queries"],
    key_id: Int[Tensor, " keys"],
    chunk_elements: int = 1 << 22,
) -> tuple[Int[Tensor, " queries"], Int[Tensor, " keys"]]:
    """Rank keys for queries, and queries for keys, as :func:`retrieval_rank` does, from one product for both directions.

    The product is in float32. Scores that its rounding could have moved across the best right one are computed again in
    float64, so the ranks are those of float64 scores.

    Args:
        query: Embeddings of one side, such as images.
        key: Embeddings of the other, such as texts.
        query_id: The image each query belongs to.
        key_id: The image each key belongs to.
        chunk_elements: How many scores may exist at once. Lower it where memory is short.

    Returns:
        The rank of each query, and that of each key.
    """
    return _ranks(query, key, query_id, key_id, both=True, chunk_elements=chunk_elements)


def recall_at_k(rank: Int[Tensor, " queries"], k: int) -> Float[Tensor, ""]:
    """Compute the fraction of queries whose best right key is among the first ``k``, in percent.

    Example:
        >>> import torch
        >>> from lightning_itm.functional import recall_at_k
        >>> recall_at_k(torch.tensor([0, 0, 3, 12]), 5)
        tensor(75.)
    """
    return 100 * (rank < k).float().mean()


@torch.no_grad()
def _ranks(
    query: Tensor, key: Tensor, query_id: Tensor, key_id: Tensor, *, both: bool, chunk_elements: int
) -> tuple[Tensor, Tensor]:
    # The second result means nothing unless `both`.
    wide = torch.float32 if query.device.type == "mps" else torch.float64
    q, k = query.to(wide), key.to(wide)
    right_query, right_key = _right_pairs(query_id, key_id)
    score = _dots(q, k, right_query, right_key)
    of_query, of_key = (
        _Best.of(score, right, len(side), _slack(side, other))
        for right, side, other in ((right_query, q, k), (right_key, k, q if both else q[:0]))
    )
    # A right key is no error: what it adds to the count below is taken off beforehand.
    query_rank, key_rank = (
        -best.counts(score, right) for best, right in ((of_query, right_query), (of_key, right_key))
    )
    low_query, low_key = query.float(), key.float()
    num_rows = min(len(q), max(1, chunk_elements // max(1, len(k))))
    buffers = _Buffers.of(num_rows, low_key)
    with torch.autocast(q.device.type, enabled=False), full_precision_products():
        for rows in torch.arange(len(q), device=q.device).split(max(1, num_rows)):
            scores = buffers.first(len(rows)).multiply(low_query[rows], low_key)  # (rows, keys)
            exact = _Exact(q[rows], k)
            query_rank[rows] += _reaching(scores, of_query.rows(rows), exact, dim=1)
            if both:
                key_rank += _reaching(scores, of_key, exact, dim=0)
    return query_rank, key_rank


class _Best(NamedTuple):
    # The best right score of each row, −inf where nothing is right, and how far float32 scores may be off.
    score: Tensor  # (rows,)
    slack: Tensor  # (rows,)

    @classmethod
    def of(cls, score: Tensor, row: Tensor, num_rows: int, slack: Tensor) -> "_Best":
        best = score.new_full((num_rows,), -torch.inf).scatter_reduce(0, row, score, "amax")
        return cls(best, slack)

    def rows(self, rows: Tensor) -> "_Best":
        return _Best(self.score[rows], self.slack[rows])

    def is_reached(self, score: Tensor, row: Tensor) -> Tensor:
        # Products of float32 values are exact in float64, their sums are not: equal rows can still differ by 1e-16.
        return ~(score < self.score[row] - _ROUNDING)

    def counts(self, score: Tensor, row: Tensor) -> Tensor:
        return torch.zeros_like(self.score, dtype=torch.int64).index_add_(0, row, self.is_reached(score, row).long())


class _Exact:
    # The scores of a block as float64 has them.
    def __init__(self, q: Tensor, k: Tensor) -> None:
        self.q, self.k = q, k

    def some(self, row: Tensor, column: Tensor) -> Tensor:
        return _dots(self.q, self.k, row, column)

    @functools.cached_property
    def all(self) -> Tensor:
        return self.q @ self.k.T


class _Buffers(NamedTuple):
    # Memory for the scores of a block, taken once: with new memory for each block, its pages cost a fifth of the product.
    scores: Tensor  # (rows, keys), float32
    masks: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, num_rows: int, key: Tensor) -> "_Buffers":
        scores = key.new_empty(num_rows, len(key))
        return cls(scores, (scores.bool(), scores.bool()))

    def first(self, num_rows: int) -> "_Buffers":
        return _Buffers(self.scores[:num_rows], (self.masks[0][:num_rows], self.masks[1][:num_rows]))

    def multiply(self, query: Tensor, key: Tensor) -> "_Buffers":
        torch.mm(query, key.T, out=self.scores)
        return self


def _reaching(block: _Buffers, best: _Best, exact: _Exact, *, dim: int) -> Tensor:
    # How many scores of each row (dim 1) or column (dim 0) of a block reach the best right one.
    low, high = ((best.score + sign * best.slack).float().unsqueeze(dim) for sign in (-1, 1))
    is_certain = torch.gt(block.scores, high, out=block.masks[0])
    is_possible = torch.lt(block.scores, low, out=block.masks[1]).logical_not_()  # not a number: possible
    certain, possible = (mask.view(torch.uint8).sum(dim, dtype=torch.int32) for mask in (is_certain, is_possible))
    num_open = int((possible - certain).sum())
    if num_open > is_certain.numel() // 16:  # a collapsed model
        return (~(exact.all < (best.score - _ROUNDING).unsqueeze(dim))).sum(dim)
    counts = certain.long()
    if num_open:
        row, column = _places(is_possible.logical_xor_(is_certain))
        which = row if dim == 1 else column
        counts.index_add_(0, which, best.is_reached(exact.some(row, column), which).long())
    return counts


def _places(mask: Tensor) -> tuple[Tensor, Tensor]:
    # Row and column of the few that are True, found eight at a time.
    flat = mask.flatten()
    if len(flat) % 8:
        row, column = mask.nonzero(as_tuple=True)
        return row, column
    eights = flat.view(torch.int64).nonzero()  # (found, 1)
    place = (8 * eights + torch.arange(8, device=mask.device)).flatten()
    place = place[flat[place]]
    return place.div(mask.shape[1], rounding_mode="floor"), place % mask.shape[1]


def _right_pairs(query_id: Tensor, key_id: Tensor) -> tuple[Tensor, Tensor]:
    # All pairs of a query and a key of one image: row numbers of queries, and of keys.
    order = query_id.argsort(stable=True)
    ids = query_id[order]
    first, last = torch.searchsorted(ids, key_id), torch.searchsorted(ids, key_id, right=True)
    num = last - first  # (keys,)
    key = torch.arange(len(key_id), device=key_id.device).repeat_interleave(num)
    place = torch.arange(len(key), device=key.device) - (num.cumsum(0) - num)[key]
    return order[first[key] + place], key


def _dots(q: Tensor, k: Tensor, row: Tensor, column: Tensor) -> Tensor:
    parts = zip(row.split(_DOTS), column.split(_DOTS), strict=True)
    return torch.cat([(q[some] * k[others]).sum(dim=1) for some, others in parts] or [q.new_zeros(0)])


def _slack(side: Tensor, other: Tensor) -> Tensor:
    # A float32 sum of `dim` products is off by at most dim · 2⁻²⁴ of the product of both norms, in whatever order it is added.
    # The rest is for inputs and thresholds that are rounded to float32.
    norm = other.norm(dim=1).amax() if len(other) else side.new_zeros(())
    slack: Tensor = (side.shape[1] + 16) * 2**-24 * side.norm(dim=1) * norm
    return slack


def _rank_of_rows(similarity: Tensor, right: Tensor) -> Tensor:
    # (queries, keys) -> (queries, 1), −inf where no key is right.
    best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    beaten = similarity < best - _ROUNDING
    return (~beaten & ~right).sum(dim=1)


_ROUNDING = 1e-12
_DOTS = 1 << 14  # pairs of rows that are compared at once
