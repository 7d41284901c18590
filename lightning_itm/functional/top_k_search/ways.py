"""The ways of :func:`~lightning_itm.functional.top_k_negatives`: a cheap one first, a slower one where it may miss."""

from abc import ABC, abstractmethod
from importlib.util import find_spec
from math import factorial
from typing import cast

import torch
from torch import Tensor

from lightning_itm.functional.precision import full_precision_products
from lightning_itm.functional.top_k_search.candidates import (
    MAX_ROWS,
    LowKeys,
    OwnKeys,
    TopK,
    candidate_products,
    compare,
    hardest_first,
    most_extreme,
    multiplies_bfloat16,
    to_bfloat16,
)
from lightning_itm.functional.top_k_search.grouped import Shortlist, group_keys, group_maxima, grouped_shortlist


class Way(ABC):
    """One way to search. Beside the keys it finds, it says for which anchors it may have missed one."""

    num_rows: int
    """How many anchors it takes at once."""
    slower: "Way | None" = None
    """What searches again where this one is unsure. (No list of ways: beartype, in tests, draws a random item of a list.)"""

    @abstractmethod
    def find(self, anchors: Tensor, own: OwnKeys | None, limit: Tensor | None) -> tuple[TopK, Tensor | None]:
        """Search for a few anchors. The second is True for an anchor that must be searched again, or None for none of them."""


class Exact(Way):
    """All products in float32."""

    def __init__(self, keys: Tensor, k: int, memory_budget: int) -> None:
        self.keys, self.k = keys, k
        self.num_rows = min(MAX_ROWS, max(1, memory_budget // (4 * len(keys))))
        self.buffer = keys.new_empty(0)

    def find(self, anchors: Tensor, own: OwnKeys | None, limit: Tensor | None) -> tuple[TopK, Tensor | None]:
        """Multiply, mask, choose."""
        size = len(anchors) * len(self.keys)
        if len(self.buffer) < size:  # reused for every chunk: new pages cost as much as the products
            self.buffer = self.keys.new_empty(size)
        scores = self.buffer[:size].view(len(anchors), len(self.keys))
        with full_precision_products():
            torch.mm(anchors, self.keys.T, out=scores)
        # (rows, keys): own keys and those above the limit fall out before the choice, so that k remain if there are k.
        if own:
            own.mask(scores)
        if limit is not None:
            scores.masked_fill_(scores > limit[:, None] + _ROUNDING, -torch.inf)
        # A few more than k: `mm` rounds differently with another number of rows, `candidate_products` does not, and decides.
        index = most_extreme(scores, min(self.k + _NUM_SPARE, len(self.keys)))
        nothing, exact = scores.gather(1, index) == -torch.inf, candidate_products(anchors, self.keys, index)
        if limit is not None:
            nothing |= exact > limit[:, None]
        found = hardest_first(exact.masked_fill(nothing, -torch.inf), index)
        return TopK(found.scores[:, : self.k], found.index[:, : self.k]), None


class Chunked(Way):
    """Products in bfloat16 choose candidates, which are compared in float32."""

    def __init__(self, keys: Tensor, low: LowKeys, k: int, memory_budget: int, *, slower: Way) -> None:
        self.keys, self.low, self.k, self.slower = keys, low, k, slower
        self.num_rows = min(MAX_ROWS, max(1, memory_budget // (4 * len(keys))))
        self.buffer = low.keys.new_empty(0)

    def find(self, anchors: Tensor, own: OwnKeys | None, limit: Tensor | None) -> tuple[TopK, Tensor | None]:
        """Choose, and compare."""
        num_keys, num_columns = len(self.keys), len(self.low.keys)
        size = len(anchors) * num_columns
        if len(self.buffer) < size:
            self.buffer = self.low.keys.new_empty(size)
        scores = self.buffer[:size].view(len(anchors), num_columns)
        torch.mm(anchors.bfloat16(), self.low.keys.T, out=scores)
        # Columns of padding, which must never be chosen before a key.
        scores[:, num_keys:] = -torch.inf
        if own:
            own.mask(scores[:, :num_keys])
        index = most_extreme(scores, min(self.k + _NUM_SPARE, num_keys))
        rough = scores.gather(1, index).float()
        left_out = rough.amin(dim=1) if index.shape[1] < num_keys else rough.new_full((len(rough),), -torch.inf)
        # A padding column is chosen only where nothing else is left, and its score is -inf then.
        candidates = Shortlist(index.clamp_max(num_keys - 1), rough, left_out)
        return compare(anchors, self.keys, self.low.centre, candidates, self.k)


class Guarded(Way):
    """Products in bfloat16 say how far below its limit each score is. The candidates are those that are nearest to it."""

    def __init__(self, keys: Tensor, k: int, memory_budget: int, *, slower: Way) -> None:
        self.keys, self.k, self.slower = keys, k, slower
        self.low = to_bfloat16(keys, num_ones=2)
        self.num_rows = min(MAX_ROWS, max(1, memory_budget // (4 * len(keys))))
        self.slack = 2**-9 * float((keys - self.low.centre).norm(dim=1).amax())
        self.longest = float(keys.norm(dim=1).amax())
        self.buffer = self.low.keys.new_empty(0)

    def find(self, anchors: Tensor, own: OwnKeys | None, limit: Tensor | None) -> tuple[TopK, Tensor | None]:
        """Choose, and compare."""
        limit = cast("Tensor", limit)  # there is one, because a guard was given
        num_keys, num_columns = len(self.keys), len(self.low.keys)
        size = len(anchors) * num_columns
        if len(self.buffer) < size:
            self.buffer = self.low.keys.new_empty(size)
        below = self.buffer[:size].view(len(anchors), num_columns)
        with full_precision_products():
            shift = anchors @ self.low.centre
        # (rows,): an infinite limit says no more than one that no score reaches.
        reach = 1.01 * self.longest * anchors.norm(dim=1)
        highest = limit.clamp(-reach, reach) + self.slack - shift
        # The limit, in two parts as bfloat16 has few digits, meets the ones of the keys: below = limit - score.
        low = self.low.keys.new_zeros(len(anchors), self.low.keys.shape[1])
        dim = anchors.shape[1]
        low[:, :dim], low[:, dim] = -anchors, highest
        low[:, dim + 1] = highest - low[:, dim].float()
        torch.mm(low, self.low.keys.T, out=below)
        # One pass over the scores instead of two with a mask. Then columns of padding and own keys.
        torch.nn.functional.threshold(below, 0.0, torch.inf, inplace=True)
        below[:, num_keys:] = torch.inf
        if own:
            own.mask(below[:, :num_keys], torch.inf)
        index = most_extreme(below, min(self.k + 2 * _NUM_SPARE, num_keys), largest=False)
        rough = highest[:, None] - below.gather(1, index).float()
        left_out = rough.amin(dim=1) if index.shape[1] < num_keys else rough.new_full((len(rough),), -torch.inf)
        candidates = Shortlist(index.clamp_max(num_keys - 1), rough, left_out)
        return compare(anchors, self.keys, self.low.centre, candidates, self.k, limit, self.slack)


class Grouped(Way):
    """The best of each group of keys are the candidates, by products in bfloat16 that are not written."""

    def __init__(
        self, keys: Tensor, low: LowKeys, own: OwnKeys | None, k: int, memory_budget: int, *, slower: Way
    ) -> None:
        self.slower = slower
        self.keys, self.k, self.memory_budget, self.centre = keys, k, memory_budget // 2, low.centre
        # A kernel compares 32 bits twice as fast as 64.
        ids = () if own is None else (own.anchor_id, own.key_id)
        is_narrow = all(-(2**31) <= int(bound) < 2**31 for part in ids for bound in part.aminmax())
        self.id_dtype = torch.int32 if is_narrow else torch.int64
        key_id = None if own is None else own.key_id.to(self.id_dtype)
        self.grouped = group_keys(low.keys[: len(keys)], group_size(k, len(keys)), key_id)
        # Half of the budget for the best of each group, and for choosing among the first.
        per_row = 4 * (_DEPTH + 1) * self.grouped.num_groups
        self.num_rows = min(_MAX_GROUPED_ROWS, max(1, memory_budget // 2 // per_row))

    def find(self, anchors: Tensor, own: OwnKeys | None, limit: Tensor | None) -> tuple[TopK, Tensor | None]:
        """Choose, and compare."""
        best = group_maxima(
            anchors.bfloat16(),
            self.grouped,
            depth=_DEPTH,
            anchor_id=None if own is None else own.anchor_id.to(self.id_dtype),
            memory_budget=self.memory_budget,
        )
        candidates = grouped_shortlist(best, min(self.k + _NUM_SPARE, len(self.keys)), self.grouped.group_size)
        if own:  # the kernel compares images alone
            candidates = own.without_equal_captions(candidates)
        return compare(anchors, self.keys, self.centre, candidates, self.k)


def group_size(k: int, num_keys: int) -> int:
    """Return the largest group in which ``_DEPTH`` of the ``k`` nearest rarely meet.

    Of keys that are spread at random, this happens to about k^d / (d! groups^(d - 1)) of the anchors, d being ``_DEPTH``.
    Such an anchor is searched again. On the other hand, a small group leaves more maxima to choose among.
    """
    size = _LARGEST_GROUP
    while size > 2 and k**_DEPTH / (factorial(_DEPTH) * (num_keys / size) ** (_DEPTH - 1)) > _SEARCHED_AGAIN:
        size //= 2
    return size


def search_all(
    anchors: Tensor,
    keys: Tensor,
    own: OwnKeys | None,
    k: int,
    ceiling: Tensor | None,
    memory_budget: int | None,
    method: str,
) -> TopK:  # no list: beartype looks at a random item, and a test's random stream would differ
    """Search for all anchors, as described in :func:`~lightning_itm.functional.top_k_search.top_k.top_k_negatives`."""
    if memory_budget is None:
        memory_budget = 256 << 20 if keys.device.type == "cpu" else 1 << 30
    if method == "auto":
        method = "grouped" if keys.is_cuda and find_spec("triton") is not None else "chunked"
    way: Way = Exact(keys, k, memory_budget)
    if ceiling is not None and multiplies_bfloat16(keys.device):
        way = Guarded(keys, k, memory_budget, slower=way)
    elif ceiling is None and (method == "grouped" or multiplies_bfloat16(keys.device)):
        low = to_bfloat16(keys)
        way = Chunked(keys, low, k, memory_budget, slower=way)
        if method == "grouped":
            way = Grouped(keys, low, own, k, memory_budget, slower=way)
    found, remaining = [], torch.arange(len(anchors), device=anchors.device)
    while len(remaining):
        rows, remaining = remaining.tensor_split((way.num_rows,))
        part, num_again = _search(way, anchors, rows, own, ceiling)
        if way.slower is not None and 2 * num_again > len(rows):  # too many alike for this way to tell apart
            way = way.slower
        found.append(part)
    return TopK(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _search(way: Way, anchors: Tensor, rows: Tensor, own: OwnKeys | None, ceiling: Tensor | None) -> tuple[TopK, int]:
    """Search for the anchors of one chunk, and again by the next way where the first is unsure: of how many, it says."""
    limit = None if ceiling is None else ceiling[rows]
    found, unsure = way.find(anchors[rows], own and own.of(rows), limit)
    if unsure is None or way.slower is None:
        return found, 0
    again = unsure.nonzero().squeeze(1)
    for few in again.split(way.slower.num_rows) if len(again) else ():
        better, _ = _search(way.slower, anchors, rows[few], own, ceiling)
        found.scores[few], found.index[few] = better.scores, better.index
    return found, len(again)


_NUM_SPARE = 64
_ROUNDING = 1e-5
"""By which products of unit-norm vectors in float32 differ from each other at most, whatever the order of their sums."""
_DEPTH = 4
_LARGEST_GROUP, _SEARCHED_AGAIN = 64, 0.002
_MAX_GROUPED_ROWS = 4096
