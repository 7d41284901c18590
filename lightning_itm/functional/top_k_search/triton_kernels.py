"""Triton kernels of the search: the best keys of each group, and the products of each anchor with its own candidates.

``lightning_itm/functional/top_k_search/grouped.py`` and ``top_k.py`` call them and have the same in plain PyTorch.
"""

from typing import no_type_check

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with PyTorch's builds for CUDA
    triton = None
try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before Triton 3.4
    TensorDescriptor = None
IS_AVAILABLE = triton is not None

# The kernel is for any type of number: in Triton's interpreter, products in bfloat16 are wrong, and tests multiply float32.
if triton is not None:

    @triton.jit
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
        has_descriptors: tl.constexpr,
        tile_anchors: tl.constexpr,
        tile_keys: tl.constexpr,
        tile_dim: tl.constexpr,
    ) -> None:
        tile_groups: tl.constexpr = tile_keys // group_size
        first_row, first_column = tl.program_id(0) * tile_anchors, tl.program_id(1) * tile_keys
        row, column = first_row + tl.arange(0, tile_anchors), first_column + tl.arange(0, tile_keys)
        member, group = column % group_size, column // group_size
        # The last tile may reach beyond the last group, the last member of a group beyond the last key.
        row_there = row < num_anchors
        key_there = (group < num_groups) & (member * num_groups + group < num_keys)
        row_start, column_start = row.to(tl.int64) * dim, column.to(tl.int64) * dim
        scores = tl.zeros((tile_anchors, tile_keys), dtype=tl.float32)
        for start in range(0, dim, tile_dim):
            if has_descriptors:
                a, b = anchors.load([first_row, start]), keys.load([first_column, start])
            else:
                place = start + tl.arange(0, tile_dim)
                inside = place < dim
                a = tl.load(anchors + row_start[:, None] + place[None, :], row_there[:, None] & inside[None, :], 0.0)
                b = tl.load(keys + column_start[:, None] + place[None, :], key_there[:, None] & inside[None, :], 0.0)
            scores = tl.dot(a, b.T, scores)
        # A score's low bits give way to the member's number. Comparisons are of floats: a unit for integers is half as wide,
        # and what is done here for each score takes as long as the products.
        packed = ((scores.to(tl.int32, bitcast=True) & -group_size) | member[None, :]).to(tl.float32, bitcast=True)
        is_candidate = key_there[None, :]
        if has_ids:
            of_row, of_key = tl.load(anchor_id + row, row_there, 0), tl.load(key_id + column, key_there, 0)
            is_candidate = is_candidate & (of_row[:, None] != of_key[None, :])
        packed = tl.where(is_candidate, packed, float("-inf"))
        packed = tl.reshape(packed, (tile_anchors, tile_groups, group_size))
        group = tl.program_id(1) * tile_groups + tl.arange(0, tile_groups)
        into = best + row.to(tl.int64)[:, None] * num_groups + group[None, :]
        is_stored = row_there[:, None] & (group < num_groups)[None, :]
        for number in tl.static_range(depth):
            largest = tl.max(packed, axis=2)
            bits = largest.to(tl.int32, bitcast=True)
            ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
            tl.store(into, tl.where(largest == float("-inf"), -2147483648, ordered), is_stored)
            into += layer
            if number + 1 < depth:
                packed = tl.where(packed == largest[:, :, None], float("-inf"), packed)

    @triton.jit
    @no_type_check  # checked, it would no longer be a plain function, which is what Triton compiles
    def _products(
        anchors, keys, index, products, num_candidates, dim, tile_candidates: tl.constexpr, tile_dim: tl.constexpr
    ) -> None:
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * tile_candidates + tl.arange(0, tile_candidates)
        there = column < num_candidates
        key = tl.load(index + row * num_candidates + column, there, 0)
        # Summed over the tiles first and within a row once at the end: a reduction costs more than a product.
        sums = tl.zeros((tile_candidates, tile_dim), dtype=tl.float32)
        for start in range(0, dim, tile_dim):
            place = start + tl.arange(0, tile_dim)
            inside = place < dim
            a = tl.load(anchors + row * dim + place, inside, 0.0)
            b = tl.load(keys + key[:, None] * dim + place[None, :], there[:, None] & inside[None, :], 0.0)
            sums += a[None, :] * b
        tl.store(products + row * num_candidates + column, tl.sum(sums, axis=1), there)


def group_maxima_kernel(
    anchors: Tensor,
    keys: Tensor,
    num_keys: int,
    group_size: int,
    depth: int,
    anchor_id: Tensor | None,
    key_id: Tensor | None,
) -> Tensor:
    """Run the kernel: int32 `(depth, anchors, groups)`.

    Raises:
        RuntimeError: Triton is not installed.
    """
    if triton is None:
        raise RuntimeError("Expected Triton, which comes with PyTorch's builds for CUDA; it is not installed.")
    num_groups = len(keys) // group_size
    best = torch.empty(depth, len(anchors), num_groups, dtype=torch.int32, device=keys.device)
    has_ids = anchor_id is not None and key_id is not None
    tile_keys = max(TILE_KEYS, group_size)
    grid = -(-len(anchors) // TILE_ANCHORS), -(-len(keys) // tile_keys)
    anchors, keys = anchors.contiguous(), keys.contiguous()
    has_descriptors = TensorDescriptor is not None and keys.is_cuda and _can_copy_tiles(keys)
    # Programs that follow each other differ in their anchors, and share a tile of keys in the cache.
    _kernel[grid](
        TensorDescriptor.from_tensor(anchors, [TILE_ANCHORS, TILE_DIM]) if has_descriptors else anchors,
        TensorDescriptor.from_tensor(keys, [tile_keys, TILE_DIM]) if has_descriptors else keys,
        anchor_id.contiguous() if anchor_id is not None and has_ids else best,
        key_id.contiguous() if key_id is not None and has_ids else best,
        best,
        len(anchors) * num_groups,
        len(anchors),
        num_keys,
        num_groups,
        keys.shape[1],
        group_size=group_size,
        depth=depth,
        has_ids=has_ids,
        has_descriptors=has_descriptors,
        tile_anchors=TILE_ANCHORS,
        tile_keys=tile_keys,
        tile_dim=TILE_DIM,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    return best


def products_kernel(anchors: Tensor, keys: Tensor, index: Tensor) -> Tensor:
    """Multiply each anchor with the keys that ``index`` names, in float32: `(anchors, candidates)`.

    Each chosen key is read once, and nothing but the products is written. A gather would write the key and read it again.
    """
    products = torch.empty(index.shape, dtype=torch.float32, device=keys.device)
    grid = len(anchors), -(-index.shape[1] // TILE_CANDIDATES)
    _products[grid](
        anchors.contiguous(),
        keys.contiguous(),
        index.contiguous(),
        products,
        index.shape[1],
        keys.shape[1],
        tile_candidates=TILE_CANDIDATES,
        tile_dim=TILE_PRODUCT_DIM,
        num_warps=4,
    )
    return products


def _can_copy_tiles(keys: Tensor) -> bool:
    """Return whether the device has an engine that copies tiles (Hopper and later) and the rows begin where it can read."""
    has_engine = torch.cuda.get_device_capability(keys.device) >= (9, 0)
    return has_engine and keys.shape[1] * keys.element_size() % 16 == 0


TILE_ANCHORS, TILE_KEYS, TILE_DIM = 128, 128, 64
NUM_WARPS, NUM_STAGES = 4, 3
TILE_CANDIDATES, TILE_PRODUCT_DIM = 32, 128
