"""Search the most similar keys of every anchor: in chunks, by rough products where they are cheap, then in float32."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_itm.functional import grouped_top_k
from lightning_itm.functional.grouped_top_k import Shortlist


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


def search_all(
    anchors: Tensor,
    keys: Tensor,
    own: OwnKeys | None,
    k: int,
    ceiling: Tensor | None,
    memory_budget: int,
    is_grouped: bool,
) -> TopK:  # no list: beartype looks at a random item, and a test's random stream would differ
    chooses = ceiling is None and (is_grouped or _multiplies_bfloat16(keys.device))
    low = _bfloat16(keys) if chooses else None
    is_grouped = is_grouped and low is not None
    num_exact = min(_MAX_ROWS, max(1, memory_budget // (4 * len(keys))), len(anchors))
    num_rows = grouped_top_k.num_grouped_rows(memory_budget, len(keys)) if is_grouped else num_exact
    # Reused for every chunk: new pages cost as much as the products.
    dtype = torch.float32 if low is None else torch.bfloat16
    buffer = keys.new_empty(0 if is_grouped else num_exact * len(keys), dtype=dtype)
    found: list[TopK] = []
    for rows in torch.arange(len(anchors), device=anchors.device).split(num_rows):
        if low is None:
            for few in rows.split(num_exact):
                limit = None if ceiling is None else ceiling[few]
                found.append(_search(anchors[few], keys, own and own.of(few), k, buffer, limit))
            continue
        own_rows = own and own.of(rows)
        if is_grouped:
            shortlist = _choose_grouped(anchors[rows], low, own_rows, k, memory_budget)
        else:
            shortlist = _choose_chunked(anchors[rows], low, own_rows, k, buffer)
        part, unsure = _compare(anchors[rows], keys, low.centre, shortlist, k)
        again = unsure.nonzero().squeeze(1)
        for few in again.split(num_exact) if len(again) else ():
            exact = _search(anchors[rows[few]], keys, own and own.of(rows[few]), k)
            part.scores[few], part.index[few] = exact.scores, exact.index
        if 2 * len(again) > len(rows):  # too many alike for bfloat16 to tell apart
            low, buffer = None, keys.new_empty(num_exact * len(keys))
        found.append(part)
    return TopK(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _search(
    anchors: Tensor,
    keys: Tensor,
    own: OwnKeys | None,
    k: int,
    buffer: Tensor | None = None,
    limit: Tensor | None = None,
) -> TopK:
    buffer = keys.new_empty(len(anchors) * len(keys)) if buffer is None else buffer
    scores = buffer[: len(anchors) * len(keys)].view(len(anchors), len(keys))
    with _full_precision_products():
        torch.mm(anchors, keys.T, out=scores)
    if own:
        own.mask(scores)
    if limit is not None:
        scores.masked_fill_(scores > limit[:, None], -torch.inf)
    index = _largest(scores, min(k, len(keys)))
    rough = scores.gather(1, index)
    return _hardest_first(_products(anchors, keys, index).masked_fill(rough == -torch.inf, -torch.inf), index)


def _choose_chunked(anchors: Tensor, low: "_LowKeys", own: OwnKeys | None, k: int, buffer: Tensor) -> Shortlist:
    """Choose candidates from products in bfloat16."""
    scores = buffer[: len(anchors) * len(low.keys)].view(len(anchors), len(low.keys))
    torch.mm(anchors.bfloat16(), low.keys.T, out=scores)
    if own:
        own.mask(scores)
    index = _largest(scores, min(k + _NUM_SPARE, len(low.keys)))
    rough = scores.gather(1, index).float()
    smallest = rough.amin(dim=1)
    return Shortlist(
        index, rough, smallest if index.shape[1] < len(low.keys) else torch.full_like(smallest, -torch.inf)
    )


def _choose_grouped(anchors: Tensor, low: "_LowKeys", own: OwnKeys | None, k: int, memory_budget: int) -> Shortlist:
    """Choose candidates from the best of each group of keys, by products in bfloat16."""
    best = grouped_top_k.group_maxima(
        anchors.bfloat16(),
        low.keys,
        group_size=grouped_top_k.GROUP_SIZE,
        depth=grouped_top_k.DEPTH,
        anchor_id=None if own is None else own.anchor_id,
        key_id=None if own is None else own.key_id,
        memory_budget=memory_budget // 2,
    )
    return grouped_top_k.grouped_shortlist(best, min(k + _NUM_SPARE, len(low.keys)), grouped_top_k.GROUP_SIZE)


def _compare(anchors: Tensor, keys: Tensor, centre: Tensor, shortlist: Shortlist, k: int) -> tuple[TopK, Tensor]:
    """Compare candidates in float32; the second is True for an anchor that these may not be good enough for."""
    index, rough, left_out = shortlist
    nothing = rough == -torch.inf
    exact = _products(anchors, keys, index)
    centred = exact - (anchors @ centre)[:, None]
    error = (centred - rough).masked_fill(nothing, 0).abs().amax()
    k = min(k, len(keys))
    kth = centred.masked_fill(nothing, -torch.inf).kthvalue(index.shape[1] - k + 1, dim=1).values
    best = _hardest_first(exact.masked_fill(nothing, -torch.inf), index)
    return TopK(best.scores[:, :k], best.index[:, :k]), kth < left_out + error


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


class _LowKeys(NamedTuple):
    """Keys in bfloat16, less their centre, which changes no order: what most embeddings share would cost the most bits."""

    keys: Tensor
    centre: Tensor


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether the hardware does."""
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _bfloat16(keys: Tensor) -> _LowKeys:
    """Convert the keys."""
    centre = keys.mean(dim=0)
    low = torch.empty(keys.shape, dtype=torch.bfloat16, device=keys.device)
    for part, into in zip(keys.split(_MAX_ROWS), low.split(_MAX_ROWS), strict=True):
        torch.sub(part, centre, out=into)
    return _LowKeys(low, centre)


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
_MAX_ROWS = 512  # more do not make the products faster, and their scores leave the cache
_GATHER_BYTES = 256 << 20
