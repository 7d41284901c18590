"""What every way of the search needs: products in two precisions, the choice of candidates, and their comparison."""

import copy
import warnings
from importlib.util import find_spec
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_itm.functional.precision import full_precision_products
from lightning_itm.functional.similarity import shares_caption
from lightning_itm.functional.top_k_search.grouped import Shortlist


class TopK(NamedTuple):
    """The hardest negatives of each anchor, the hardest first."""

    scores: Float[Tensor, "anchors k"]
    """Cosine similarity, float32; −inf where there is no further negative."""
    index: Int[Tensor, "anchors k"]  # type: ignore[assignment]  # a tuple has a method of this name
    """Row of the key; −1 where there is no further negative."""


class OwnKeys:
    """Which keys belong to the image of an anchor, or share a caption with it: few, so they are listed and not compared."""

    def __init__(
        self,
        anchor_id: Tensor,
        key_id: Tensor,
        anchor_captions: Tensor | None = None,
        key_captions: Tensor | None = None,
    ) -> None:
        self.anchor_id, self.key_id = anchor_id, key_id
        self.anchor_captions, self.key_captions = anchor_captions, key_captions
        self.by_id = key_id.sort()
        self.by_caption = None if key_captions is None else _sorted_captions(key_captions)

    def of(self, rows: Tensor) -> "OwnKeys":
        """Return the same for some of the anchors."""
        part = copy.copy(self)
        part.anchor_id = self.anchor_id[rows]
        part.anchor_captions = None if self.anchor_captions is None else self.anchor_captions[rows]
        return part

    def mask(self, scores: Tensor, value: float = -torch.inf) -> None:
        """Put ``value``, in place, where a key is the anchor's own, `(anchors, keys)`."""
        if not _mask_listed(scores, value, self.anchor_id[:, None], *self.by_id):
            scores.masked_fill_(self.anchor_id[:, None] == self.key_id, value)
        if self.anchor_captions is None or self.key_captions is None or self.by_caption is None:
            return
        if not _mask_listed(scores, value, self.anchor_captions, *self.by_caption):
            scores.masked_fill_(shares_caption(self.anchor_captions, self.key_captions), value)

    def without_equal_captions(self, candidates: Shortlist) -> Shortlist:
        """Drop candidates that share a caption with the anchor. ``left_out`` still holds for all that are not listed."""
        if self.anchor_captions is None or self.key_captions is None:
            return candidates
        of_key = self.key_captions[candidates.index][..., None]  # (anchors, candidates, captions of a key, 1)
        is_equal = (of_key == self.anchor_captions[:, None, None, :]) & (of_key >= 0)
        return candidates._replace(scores=candidates.scores.masked_fill(is_equal.flatten(2).any(dim=2), -torch.inf))


def _sorted_captions(key_captions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the captions of all keys in order, and the key of each. Those that fill up a row, −1, are left out."""
    keys = torch.arange(len(key_captions), device=key_captions.device)[:, None].expand_as(key_captions)
    is_there = key_captions >= 0
    captions, order = key_captions[is_there].sort()
    return captions, keys[is_there][order]


def _mask_listed(scores: Tensor, value: float, of_anchor: Tensor, sorted_id: Tensor, keys: Tensor) -> bool:
    """Put ``value`` where a key has one of the ids of the anchor, `(anchors, ids)`, or return False where these are many."""
    first = torch.searchsorted(sorted_id, of_anchor.contiguous())
    count = (torch.searchsorted(sorted_id, of_anchor.contiguous(), right=True) - first).flatten()
    total = int(count.sum())
    if total > scores.numel() // 16:
        return False
    # One entry per id of an anchor and key that has it: (total,).
    entry = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    position = torch.arange(total, device=count.device) - (count.cumsum(0) - count)[entry]
    scores[entry // of_anchor.shape[1], keys[first.flatten()[entry] + position]] = value
    return True


def compare(
    anchors: Tensor,
    keys: Tensor,
    centre: Tensor,
    candidates: Shortlist,
    k: int,
    limit: Tensor | None = None,
    slack: float = 0.0,
) -> tuple[TopK, Tensor]:
    """Compare candidates in float32. The second is True for an anchor that these may not be good enough for.

    Candidates above the ``limit`` of their anchor, `(anchors,)`, are dropped. Where the choice was made by a limit that was
    higher by ``slack``, it is good enough for no anchor if rough scores near the limit are further off than that.
    """
    index, rough, left_out = candidates
    nothing = rough == -torch.inf
    exact = candidate_products(anchors, keys, index)
    # (anchors,): what subtracting the centre from the keys took from each of an anchor's scores.
    with full_precision_products():
        shift = anchors @ centre
    errors = (exact - shift[:, None] - rough).masked_fill(nothing, 0).abs()
    error, is_far_off = errors.amax(), torch.zeros((), dtype=torch.bool, device=rough.device)
    if limit is not None:
        is_near = rough > (limit - shift)[:, None] - 16 * slack  # further down, bfloat16 rounds differences more
        is_far_off = errors.masked_fill(~is_near, 0).amax() > slack
        nothing |= exact > limit[:, None]
    k = min(k, len(keys))
    best = hardest_first(exact.masked_fill(nothing, -torch.inf), index)
    return TopK(best.scores[:, :k], best.index[:, :k]), (best.scores[:, k - 1] - shift < left_out + error) | is_far_off


def most_extreme(scores: Tensor, k: int, *, largest: bool = True) -> Tensor:
    """Return where the k largest, or smallest, of each row are, in the order of their places."""
    return _most_extreme(scores, k, largest=largest).sort(dim=1).values


def _most_extreme(scores: Tensor, k: int, *, largest: bool) -> Tensor:
    """Return the places in any order.

    The k most extreme lie in the k groups of columns with the most extreme values. A maximum is cheaper than a selection, so
    these groups are found in the same way.
    """
    num_groups = scores.shape[1] // _GROUP
    if num_groups <= k:
        return torch.topk(scores, k, dim=1, largest=largest, sorted=False).indices
    grouped = scores[:, : num_groups * _GROUP].view(
        len(scores), _GROUP, num_groups
    )  # a group: every num_groups-th column
    extremes = grouped.amax(dim=1) if largest else grouped.amin(dim=1)
    # (rows, k): the groups that can hold one of the k most extreme.
    group = _most_extreme(extremes, k, largest=largest)
    candidates = grouped.gather(2, group[:, None, :].expand(-1, _GROUP, -1)).flatten(1)
    candidates = torch.cat([candidates, scores[:, num_groups * _GROUP :]], dim=1)
    place = torch.topk(candidates, k, dim=1, largest=largest, sorted=False).indices
    in_group = num_groups * (place // k) + group.gather(1, place % k)
    in_rest = num_groups * _GROUP + place - _GROUP * k
    return torch.where(place < _GROUP * k, in_group, in_rest)


def hardest_first(scores: Tensor, index: Tensor) -> TopK:
    """Sort each row, `(anchors, k)`, ties in the order of the keys."""
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return TopK(scores, index.gather(1, order))


def candidate_products(anchors: Tensor, keys: Tensor, index: Tensor) -> Tensor:
    """Multiply each anchor with its own choice of keys, in float32."""
    if anchors.is_cuda and find_spec("triton") is not None:
        from lightning_itm.functional.top_k_search.triton_kernels import (
            products_kernel,
        )  # Triton takes a while, and is not everywhere

        return products_kernel(anchors, keys, index)
    if anchors.device.type != "cpu":
        rows = max(1, _GATHER_BYTES // (4 * index.shape[1] * keys.shape[1]))
        with full_precision_products():
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


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether the hardware does."""
    if device.type == "cpu":
        is_supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # older PyTorch can't tell
        return torch.backends.mkldnn.is_available() and bool(is_supported())
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def to_bfloat16(keys: Tensor, num_ones: int = 0) -> LowKeys:
    """Convert the keys. Columns of ones may follow, to add something to each score, and zeros up to a multiple of 8."""
    centre = keys.mean(dim=0)
    is_cpu = keys.device.type == "cpu"
    num_rows = len(keys) if is_cpu else -(-len(keys) // 8) * 8
    dim = keys.shape[1]
    low = torch.empty(num_rows, dim + -(-num_ones // 8) * 8, dtype=torch.bfloat16, device=keys.device)
    low[len(keys) :] = low[:, dim:] = 0
    low[:, dim : dim + num_ones] = 1
    for part, into in zip(
        *(rows.split(MAX_ROWS if is_cpu else len(keys)) for rows in (keys, low[: len(keys), :dim])), strict=True
    ):
        torch.sub(part, centre, out=into)
    return LowKeys(low, centre)


_GROUP = 8
MAX_ROWS = 512  # more do not make the products faster, and their scores leave the cache
_GATHER_BYTES = 256 << 20
