"""The best keys of each group, as a Triton kernel: see ``lightning_itm/functional/grouped_top_k.py``, which calls it."""

from typing import no_type_check

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with PyTorch's builds for CUDA
    triton = None
IS_AVAILABLE = triton is not None

# The kernel is for any type of number: in Triton's interpreter, products in bfloat16 are wrong, and tests multiply float32.
if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    @no_type_check  # checked, it would no longer be a plain function, which is what Triton compiles
    def _kernel(
        anchors,
        keys,
        anchor_id,
        key_id,
        best,
        layer,
        num_anchors,
        num_keys,
        num_groups,
        dim,
        group_size: tl.constexpr,
        depth: tl.constexpr,
        has_ids: tl.constexpr,
        tile_anchors: tl.constexpr,
        tile_keys: tl.constexpr,
        tile_dim: tl.constexpr,
    ) -> None:
        tile_groups: tl.constexpr = tile_keys // group_size
        row = tl.program_id(0) * tile_anchors + tl.arange(0, tile_anchors)
        column = tl.arange(0, tile_keys)
        key = (column % group_size) * num_groups + tl.program_id(1) * tile_groups + column // group_size
        # The last tile may reach beyond the last group, where a number is another group's key: computed, and not stored.
        row_there, key_there = row < num_anchors, key < num_keys
        row_start, key_start = row.to(tl.int64) * dim, key.to(tl.int64) * dim
        scores = tl.zeros((tile_anchors, tile_keys), dtype=tl.float32)
        for start in range(0, dim, tile_dim):
            place = start + tl.arange(0, tile_dim)
            inside = place < dim
            a = tl.load(anchors + row_start[:, None] + place[None, :], row_there[:, None] & inside[None, :], 0.0)
            b = tl.load(keys + key_start[None, :] + place[:, None], key_there[None, :] & inside[:, None], 0.0)
            scores = tl.dot(a, b, scores)
        bits = scores.to(tl.int32, bitcast=True)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        ordered = (ordered & -group_size) | (column % group_size)[None, :]
        is_candidate = key_there[None, :]
        if has_ids:
            of_row, of_key = tl.load(anchor_id + row, row_there, 0), tl.load(key_id + key, key_there, 0)
            is_candidate = is_candidate & (of_row[:, None] != of_key[None, :])
        nothing = -2147483648
        ordered = tl.where(is_candidate, ordered, nothing)
        ordered = tl.reshape(ordered, (tile_anchors, tile_groups, group_size))
        group = tl.program_id(1) * tile_groups + tl.arange(0, tile_groups)
        into = best + row.to(tl.int64)[:, None] * num_groups + group[None, :]
        is_stored = row_there[:, None] & (group < num_groups)[None, :]
        for place_in_group in tl.static_range(depth):
            largest = tl.max(ordered, axis=2)
            tl.store(into, largest, is_stored)
            into += layer
            if place_in_group + 1 < depth:
                ordered = tl.where(ordered == largest[:, :, None], nothing, ordered)


def group_maxima_kernel(
    anchors: Tensor, keys: Tensor, group_size: int, depth: int, anchor_id: Tensor | None, key_id: Tensor | None
) -> Tensor:
    """Run the kernel: int32 `(depth, anchors, groups)`.

    Raises:
        RuntimeError: Triton is not installed.
    """
    if triton is None:
        raise RuntimeError("Expected Triton, which comes with PyTorch's builds for CUDA; it is not installed.")
    num_groups = -(-len(keys) // group_size)
    best = torch.empty(depth, len(anchors), num_groups, dtype=torch.int32, device=keys.device)
    has_ids = anchor_id is not None and key_id is not None
    tile_keys = max(TILE_KEYS, group_size)
    grid = -(-len(anchors) // TILE_ANCHORS), -(-num_groups // (tile_keys // group_size))
    # Programs that follow each other differ in their anchors, and share a tile of keys in the cache.
    _kernel[grid](
        anchors.contiguous(),
        keys.contiguous(),
        anchor_id.contiguous() if anchor_id is not None and has_ids else best,
        key_id.contiguous() if key_id is not None and has_ids else best,
        best,
        len(anchors) * num_groups,
        len(anchors),
        len(keys),
        num_groups,
        keys.shape[1],
        group_size=group_size,
        depth=depth,
        has_ids=has_ids,
        tile_anchors=TILE_ANCHORS,
        tile_keys=tile_keys,
        tile_dim=TILE_DIM,
        num_warps=8,
        num_stages=3,
    )
    return best


TILE_ANCHORS, TILE_KEYS, TILE_DIM = 128, 128, 64
