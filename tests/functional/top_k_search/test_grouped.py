import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from lightning_itm.functional.top_k_search import triton_kernels as kernels
from lightning_itm.functional.top_k_search.grouped import group_keys, group_maxima, grouped_shortlist, unpack

NEEDS_TRITON = pytest.mark.skipif(not kernels.IS_AVAILABLE, reason="Triton comes with PyTorch's builds for CUDA alone")
SIZES = [  # anchors, keys, dim, group size, depth, ids
    (5, 70, 33, 16, 3, torch.int64),
    (130, 300, 64, 32, 3, torch.int32),
    (1, 1, 8, 16, 1, None),
    (3, 5, 16, 64, 2, torch.int64),
    (17, 1000, 100, 128, 1, None),
]


def example(num_anchors, num_keys, dim, id_dtype, device="cpu"):
    """Embeddings whose float32 are bfloat16 exactly, so that products in either are the same but for the order of a sum."""
    generator = torch.Generator().manual_seed(num_keys)
    anchors, keys = (
        normalize(torch.randn(number, dim, generator=generator), dim=1).bfloat16().float().to(device)
        for number in (num_anchors, num_keys)
    )
    if id_dtype is None:
        return anchors, keys, {}
    ids = {
        name: torch.randint(4, (number,), generator=generator, dtype=id_dtype).to(device)
        for name, number in (("anchor_id", num_anchors), ("key_id", num_keys))
    }
    return anchors, keys, ids


def loop(anchors, keys, group_size, depth, anchor_id=None, key_id=None):
    """Lists: scores and rows of the keys, the best of each group, one anchor and one group at a time."""
    num_groups = -(-len(keys) // group_size)
    scores = (anchors.double() @ keys.double().T).tolist()
    found = []
    for i in range(len(anchors)):
        for group in range(num_groups):
            members = [
                (scores[i][key], key)
                for key in range(group, len(keys), num_groups)
                if anchor_id is None or anchor_id[i] != key_id[key]
            ]
            found.append(sorted(members, reverse=True)[:depth])
    return found


def check_equal(best, anchors, keys, group_size, depth, ids):
    num_groups = -(-len(keys) // group_size)
    assert best.shape == (depth, len(anchors), num_groups)
    scores, place = (part.flatten(1).T.tolist() for part in unpack(best.cpu(), group_size))
    ids = {name: value.cpu() for name, value in ids.items()}
    expected = loop(anchors.cpu(), keys.cpu(), group_size, depth, **ids)
    for cell, (some, places, right) in enumerate(zip(scores, place, expected, strict=True)):
        assert some[: len(right)] == pytest.approx([score for score, _ in right], abs=2e-5)
        assert some[len(right) :] == [-float("inf")] * (depth - len(right))
        found = [where * num_groups + cell % num_groups for where in places[: len(right)]]
        assert found == [key for _, key in right]


@pytest.mark.parametrize(("num_anchors", "num_keys", "dim", "group_size", "depth", "id_dtype"), SIZES)
def test_equals_the_loop(num_anchors, num_keys, dim, group_size, depth, id_dtype):
    anchors, keys, ids = example(num_anchors, num_keys, dim, id_dtype)
    grouped = group_keys(keys, group_size, ids.get("key_id"))
    for budget in (1, 1 << 20):
        best = group_maxima(anchors, grouped, depth=depth, anchor_id=ids.get("anchor_id"), memory_budget=budget)
        check_equal(best, anchors, keys, group_size, depth, ids)


@NEEDS_TRITON
@pytest.mark.slow
def test_the_kernel_in_the_interpreter_equals_the_loop():
    """In float32: the interpreter multiplies bfloat16 as if it were integers. A process of its own, for its variable."""
    code = (
        "import torch, tests.functional.top_k_search.test_grouped as here\n"
        "for num_anchors, num_keys, dim, group_size, depth, id_dtype in here.SIZES:\n"
        "    anchors, keys, ids = here.example(num_anchors, num_keys, dim, id_dtype)\n"
        "    grouped = here.group_keys(keys, group_size, ids.get('key_id'))\n"
        "    found = here.kernels.group_maxima_kernel(\n"
        "        anchors, grouped.keys, len(keys), group_size, depth, ids.get('anchor_id'), grouped.key_id)\n"
        "    here.check_equal(found, anchors, keys, group_size, depth, ids)\n"
        "for num_anchors, num_keys, dim, num_candidates in ((3, 50, 33, 7), (1, 1, 8, 1), (4, 300, 130, 364)):\n"
        "    anchors, keys, _ = here.example(num_anchors, num_keys, dim, None)\n"
        "    index = torch.randint(num_keys, (num_anchors, num_candidates))\n"
        "    exact = (anchors.double() @ keys.double().T).gather(1, index)\n"
        "    found = here.kernels.products_kernel(anchors, keys, index).double()\n"
        "    torch.testing.assert_close(found, exact, atol=1e-6, rtol=0)\n"
        "print('equal')\n"
    )
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.strip() == "equal", done.stderr[-3000:]


@NEEDS_TRITON
@pytest.mark.slow
@pytest.mark.parametrize(("group_size", "depth", "has_ids"), [(32, 3, True), (64, 1, False), (128, 3, True)])
def test_the_kernel_compiles_for_a_gpu_that_is_not_there(group_size, depth, has_ids, tmp_path, monkeypatch):
    """For Hopper: with its matrix instructions, and few enough registers and shared memory for two programs at a time."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"group_size": group_size, "depth": depth, "has_ids": has_ids}
    constants |= {"tile_anchors": kernels.TILE_ANCHORS, "tile_keys": 128, "tile_dim": kernels.TILE_DIM}
    constants |= {"has_descriptors": False}
    numbers = ("num_anchors", "num_keys", "num_groups", "dim")
    signature = {"anchors": "*bf16", "keys": "*bf16", "anchor_id": "*i64", "key_id": "*i64", "best": "*i32"}
    signature |= {"layer": "i64", **dict.fromkeys(numbers, "i32"), **dict.fromkeys(constants, "constexpr")}
    place = [*signature].index
    attributes = {
        (place(name),): [["tt.divisibility", 16]] for name in ("anchors", "keys", "anchor_id", "key_id", "dim")
    }
    compiled = compile(
        ASTSource(kernels._kernel, signature, constants, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": kernels.NUM_WARPS, "num_stages": kernels.NUM_STAGES},
    )
    assert "wgmma" in compiled.asm["ptx"]
    assert "ld.local" not in compiled.asm["ptx"], "registers ran out"
    assert 2 * compiled.metadata.shared <= 227 << 10


@NEEDS_TRITON
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_anchors", "num_keys", "dim", "group_size", "depth", "id_dtype"),
    [*SIZES, (257, 20_001, 512, 32, 3, torch.int64)],
)
def test_the_kernel_equals_plain_pytorch(num_anchors, num_keys, dim, group_size, depth, id_dtype, dtype):
    """By score and by row, where no two are within the error of a sum."""
    anchors, keys, ids = example(num_anchors, num_keys, dim, id_dtype, "cuda")
    anchors, keys = anchors.to(dtype), keys.to(dtype)
    found, expected = (
        group_maxima(
            anchors.to(device),
            group_keys(keys.to(device), group_size, None if id_dtype is None else ids["key_id"].to(device)),
            depth=depth,
            anchor_id=None if id_dtype is None else ids["anchor_id"].to(device),
        ).cpu()
        for device in ("cuda", "cpu")
    )
    (scores, place), (right, right_place) = unpack(found, group_size), unpack(expected, group_size)
    torch.testing.assert_close(scores, right, atol=2e-5, rtol=0)
    there = right > -torch.inf
    assert (place == right_place)[there].double().mean() > 0.999


@NEEDS_TRITON
@pytest.mark.gpu
def test_products_of_chosen_keys_are_float32():
    """Whatever PyTorch's setting for products: the kernel does not ask it."""
    torch.manual_seed(0)
    anchors, keys = (normalize(torch.randn(number, 512, device="cuda"), dim=1) for number in (300, 5000))
    index = torch.randint(5000, (300, 124), device="cuda")
    exact = (anchors.double() @ keys.double().T).gather(1, index)
    torch.testing.assert_close(kernels.products_kernel(anchors, keys, index).double(), exact, atol=1e-6, rtol=0)


@given(
    seed=st.integers(0, 1000),
    num_keys=st.integers(1, 300),
    num=st.integers(1, 40),
    group_size=st.sampled_from([1, 2, 8, 32]),
    depth=st.integers(1, 4),
    has_ids=st.booleans(),
)
def test_no_key_left_out_is_better_than_is_said(seed, num_keys, num, group_size, depth, has_ids):
    torch.manual_seed(seed)
    anchors, keys = normalize(torch.randn(6, 5), dim=1), normalize(torch.randn(num_keys, 5), dim=1)
    keys[torch.randint(num_keys, (num_keys // 3,))] = keys[0].clone()
    ids = {"anchor_id": torch.randint(3, (6,)), "key_id": torch.randint(3, (num_keys,))} if has_ids else {}
    grouped = group_keys(keys, group_size, ids.get("key_id"))
    best = group_maxima(anchors, grouped, depth=depth, anchor_id=ids.get("anchor_id"))
    found = grouped_shortlist(best, num, group_size)
    scores = anchors @ keys.T
    if ids:
        scores[ids["anchor_id"][:, None] == ids["key_id"]] = -torch.inf
    there = found.scores > -torch.inf
    assert found.index.shape == (6, num)
    torch.testing.assert_close(scores.gather(1, found.index)[there], found.scores[there], atol=2e-5, rtol=0)
    for row in range(6):
        index = found.index[row][there[row]]
        assert len(set(index.tolist())) == len(index)
        scores[row, index] = -torch.inf
    assert (scores.amax(dim=1) <= found.left_out + 1e-6).all()


def test_signs_zeros_and_order_survive_packing():
    scores = torch.tensor([[-1.0], [-0.5], [-1e-3], [-0.0], [0.0], [1e-3], [0.5], [1.0]])
    best = group_maxima(torch.ones(1, 1), group_keys(scores, 8), depth=8)
    found, place = unpack(best.flatten(), 8)
    assert place.tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    torch.testing.assert_close(found, scores.flatten().flip(0), atol=1e-6, rtol=1e-6)


def test_group_size():
    with pytest.raises(ValueError, match="`group_size` to be a power of two, got 24"):
        group_keys(torch.ones(3, 2), 24)
