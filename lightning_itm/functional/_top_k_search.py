"""The search of :func:`~lightning_itm.functional.top_k.top_k_negatives`: a cheap way first, a slower one where it may miss."""

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from math import factorial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_itm.functional.grouped_top_k import Shortlist, group_keys, group_maxima, grouped_shortlist


class TopK(NamedTuple):
    """The hardest negatives of each anchor, the hardest first."""

    scores: Float[Tensor, "anchors k"]
    """Cosine similarity, float32; −inf where there is no further negative."""
    index: Int[Tensor, "anchors k"]  # type: ignore[assignment]  # a tuple has a method of this name
    """Row of the key; −1 where there is no further negative."""


class OwnKeys:
    """Which keys belong to the image of an anchor: few, so they are listed and not compared."""

    def __init__(self, anchor_id: Tensor, key_id: Tensor) -> None:
        self.anchor_id, self.key_id = anchor_id, key_id
        self.sorted_id, self.order = key_id.sort()

    def of(self, rows: Tensor) -> "OwnKeys":
        part = copy.copy(self)
        part.anchor_id = self.anchor_id[rows]
        return part

    def mask(self, scores: Tensor) -> None:
        first = torch.searchsorted(self.sorted_id, self.anchor_id)
        count = torch.searchsorted(self.sorted_id, self.anchor_id, right=True) - first
        total = int(count.sum())
        if total > scores.numel() // 16:  # not so few
            scores.masked_fill_(self.anchor_id[:, None] == self.key_id, -torch.inf)
            return
        row = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
        place = torch.arange(total, device=count.device) - (count.cumsum(0) - count)[row]
        scores[row, self.order[first[row] + place]] = -torch.inf


class Way(ABC):
    """One way to search. Beside the keys it finds, it says for which anchors it may have missed one."""

    num_rows: int
    """How many anchors it takes at once."""
    slower: "Way | None" = None
    """What searches again where this one is unsure. (No list of ways: beartype, in tests, draws a random item of a list.)"""

    @abstractmethod
    def find(self, anchors: Tensor, own: OwnKeys | None, limit: Tensor | None) -> tuple[TopK, Tensor | None]:
        """Search for a few anchors. The second is True for an anchor that must be searched again; None: for none."""


class Exact(Way):
    """All products in float32."""

    def __init__(self, keys: Tensor, k: int, memory_budget: int) -> None:
        self.keys, self.k = keys, k
        self.num_rows = min(_MAX_ROWS, max(1, memory_budget // (4 * len(keys))))
        self.buffer = keys.new_empty(0)

    def find(self, anchors: Tensor, own: OwnKeys | None, limit: Tensor | None) -> tuple[TopK, Tensor | None]:
        """Multiply, mask, choose."""
        size = len(anchors) * len(self.keys)
        if len(self.buffer) < size:  # reused for every chunk: new pages cost as much as the products
            self.buffer = self.keys.new_empty(size)
        scores = self.buffer[:size].view(len(anchors), len(self.keys))
        with _full_precision_products():
            torch.mm(anchors, self.keys.T, out=scores)
        if own:
            own.mask(scores)
        if limit is not None:
            scores.masked_fill_(scores > limit[:, None], -torch.inf)
        # A few more than k: `mm` rounds differently with another number of rows, `_products` does not, and decides.
        index = _largest(scores, min(self.k + _NUM_SPARE, len(self.keys)))
        nothing = scores.gather(1, index) == -torch.inf
        found = _hardest_first(_products(anchors, self.keys, index).masked_fill(nothing, -torch.inf), index)
        return TopK(found.scores[:, : self.k], found.index[:, : self.k]), None


class Chunked(Way):
    """Products in bfloat16 choose candidates, which are compared in float32."""

    def __init__(self, keys: Tensor, low: "LowKeys", k: int, memory_budget: int, *, slower: Way) -> None:
        self.keys, self.low, self.k, self.slower = keys, low, k, slower
        self.num_rows = min(_MAX_ROWS, max(1, memory_budget // (4 * len(keys))))
        self.buffer = low.keys.new_empty(0)

    def find(self, anchors: Tensor, own: OwnKeys | None, limit: Tensor | None) -> tuple[TopK, Tensor | None]:
        """Choose, and compare."""
        num_keys, num_columns = len(self.keys), len(self.low.keys)
        size = len(anchors) * num_columns
        if len(self.buffer) < size:
            self.buffer = self.low.keys.new_empty(size)
        scores = self.buffer[:size].view(len(anchors), num_columns)
        torch.mm(anchors.bfloat16(), self.low.keys.T, out=scores)
        scores[:, num_keys:] = -torch.inf
        if own:
            own.mask(scores[:, :num_keys])
        index = _largest(scores, min(self.k + _NUM_SPARE, num_keys))
        rough = scores.gather(1, index).float()
        left_out = rough.amin(dim=1) if index.shape[1] < num_keys else rough.new_full((len(rough),), -torch.inf)
        # A padding column is chosen only where nothing else is left, and its score is -inf then.
        candidates = Shortlist(index.clamp_max(num_keys - 1), rough, left_out)
        return _compare(anchors, self.keys, self.low.centre, candidates, self.k)


class Grouped(Way):
    """The best of each group of keys are the candidates, by products in bfloat16 that are not written."""

    def __init__(
        self, keys: Tensor, low: "LowKeys", own: OwnKeys | None, k: int, memory_budget: int, *, slower: Way
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
        return _compare(anchors, self.keys, self.centre, candidates, self.k)


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
    """Search for all anchors; see :func:`~lightning_itm.functional.top_k.top_k_negatives`."""
    if memory_budget is None:
        memory_budget = 256 << 20 if keys.device.type == "cpu" else 1 << 30
    if method == "auto":
        method = "grouped" if keys.is_cuda and find_spec("triton") is not None else "chunked"
    way: Way = Exact(keys, k, memory_budget)
    if ceiling is None and (method == "grouped" or _multiplies_bfloat16(keys.device)):
        low = _bfloat16(keys)
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


def _compare(anchors: Tensor, keys: Tensor, centre: Tensor, candidates: Shortlist, k: int) -> tuple[TopK, Tensor]:
    """Compare candidates in float32; the second is True for an anchor that these may not be good enough for."""
    index, rough, left_out = candidates
    nothing = rough == -torch.inf
    exact = _products(anchors, keys, index)
    shift = anchors @ centre
    error = (exact - shift[:, None] - rough).masked_fill(nothing, 0).abs().amax()
    k = min(k, len(keys))
    best = _hardest_first(exact.masked_fill(nothing, -torch.inf), index)
    return TopK(best.scores[:, :k], best.index[:, :k]), best.scores[:, k - 1] - shift < left_out + error


def _largest(scores: Tensor, k: int) -> Tensor:
    """Return where the k largest of each row are, in the order of their places.

    They lie in the k groups of columns with the largest maxima, and a maximum is cheaper than a selection.
    """
    num_groups = scores.shape[1] // _GROUP
    if num_groups <= k:
        return scores.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    grouped = scores[:, : num_groups * _GROUP].view(
        len(scores), _GROUP, num_groups
    )  # a group: every num_groups-th column
    group = grouped.amax(dim=1).topk(k, dim=1, sorted=False).indices
    candidates = grouped.gather(2, group[:, None, :].expand(-1, _GROUP, -1)).flatten(1)
    rest = scores[:, num_groups * _GROUP :]
    place = torch.cat([candidates, rest], dim=1).topk(k, dim=1, sorted=False).indices
    in_group = num_groups * (place // k) + group.gather(1, place % k)
    in_rest = num_groups * _GROUP + place - _GROUP * k
    return torch.where(place < _GROUP * k, in_group, in_rest).sort(dim=1).values


def _hardest_first(scores: Tensor, index: Tensor) -> TopK:
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return TopK(scores, index.gather(1, order))


def _products(anchors: Tensor, keys: Tensor, index: Tensor) -> Tensor:
    """Multiply each anchor with its own choice of keys, in float32."""
    if anchors.is_cuda and find_spec("triton") is not None:
        from lightning_itm.functional._grouped_top_k_triton import (
            products_kernel,
        )  # Triton takes a while, and is not everywhere

        return products_kernel(anchors, keys, index)
    if anchors.device.type != "cpu":
        rows = max(1, _GATHER_BYTES // (4 * index.shape[1] * keys.shape[1]))
        with _full_precision_products():
            return torch.cat(
                [
                    torch.bmm(keys[part], a[:, :, None]).squeeze(2)
                    for a, part in zip(anchors.split(rows), index.split(rows), strict=True)
                ]
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        ends = torch.arange(0, index.numel() + 1, index.shape[1])
        pattern = torch.sparse_csr_tensor(
            ends,
            index.flatten(),
            anchors.new_zeros(index.numel()),
            size=(len(anchors), len(keys)),
            check_invariants=False,
        )
        products: Tensor = torch.sparse.sampled_addmm(pattern, anchors, keys.T, beta=0).values()
    return products.view(index.shape)


class LowKeys(NamedTuple):
    """Keys in bfloat16, less their centre, which changes no order: what most embeddings share would cost the most bits."""

    keys: Tensor
    """`(keys, dim)`; on a GPU with rows of zeros at the end, where its matrix units want a multiple of 8."""
    centre: Tensor


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether the hardware does."""
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _bfloat16(keys: Tensor) -> LowKeys:
    """Convert the keys."""
    centre = keys.mean(dim=0)
    is_cpu = keys.device.type == "cpu"
    num_rows = len(keys) if is_cpu else -(-len(keys) // 8) * 8
    low = torch.empty(num_rows, keys.shape[1], dtype=torch.bfloat16, device=keys.device)
    low[len(keys) :] = 0
    for part, into in zip(
        *(rows.split(_MAX_ROWS if is_cpu else len(keys)) for rows in (keys, low[: len(keys)])), strict=True
    ):
        torch.sub(part, centre, out=into)
    return LowKeys(low, centre)


@contextmanager
def _full_precision_products() -> Iterator[None]:
    """Multiply float32 as float32, whatever ``torch.set_float32_matmul_precision`` says."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


_GROUP = 16
_NUM_SPARE = 64
_DEPTH = 4
_LARGEST_GROUP, _SEARCHED_AGAIN = 64, 0.002
_MAX_GROUPED_ROWS = 4096
_MAX_ROWS = 512  # more do not make the products faster, and their scores leave the cache
_GATHER_BYTES = 256 << 20
