import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from lightning_itm.functional import top_k_negatives
from lightning_itm.functional.top_k_search.top_k import score_ceiling
from tests.helpers.embeddings import embeddings


def brute_force(anchors, keys, k, anchor_id, key_id, ceiling=None, rank_min=0):
    """Lists, float64, one anchor at a time: (score, -row) of what is allowed, the hardest first."""
    result = []
    for i, anchor in enumerate(anchors.double()):
        allowed = [
            (float(anchor @ key), -j)
            for j, key in enumerate(keys.double())
            if anchor_id[i] != key_id[j] and (ceiling is None or float(anchor @ key) <= ceiling[i])
        ]
        result.append(sorted(allowed, reverse=True)[rank_min : rank_min + k])
    return result


def allowed_pairs(anchor_id, key_id, anchor_captions, key_captions):
    """Lists, one pair at a time: whether a key is a negative of the anchor."""
    return [
        [
            int(own) != int(other) and not ({*of_anchor.tolist()} & {*of_key.tolist()} - {-1})
            for other, of_key in zip(key_id, key_captions, strict=True)
        ]
        for own, of_anchor in zip(anchor_id, anchor_captions, strict=True)
    ]


def check(found, expected, k):
    assert found.scores.shape == found.index.shape == (len(expected), k)
    for scores, index, right in zip(found.scores.tolist(), found.index.tolist(), expected, strict=True):
        assert scores[: len(right)] == pytest.approx([score for score, _ in right], abs=1e-6)
        assert scores[len(right) :] == [-float("inf")] * (k - len(right))
        assert index[len(right) :] == [-1] * (k - len(right))
        assert len(set(index[: len(right)])) == len(right)


@st.composite
def searches(draw):
    """Some rows twice, images with any number of texts down to one with all, numbers of anchors and keys that differ."""
    num_anchors, num_keys, num_images = draw(st.integers(1, 12)), draw(st.integers(1, 60)), draw(st.integers(1, 6))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    anchors, keys = normalize(torch.randn(num_anchors, 7), dim=1), normalize(torch.randn(num_keys, 7), dim=1)
    keys[torch.randint(num_keys, (num_keys // 3,))] = keys[0].clone()
    ids = torch.randint(num_images, (num_anchors,)), torch.randint(num_images, (num_keys,))
    return anchors, keys, *ids, draw(st.integers(1, 70)), draw(st.sampled_from([1, 400, 3000, 1 << 20]))


@pytest.mark.parametrize("method", ["auto", "grouped"])
@given(search=searches())
def test_equals_brute_force(method, search):
    anchors, keys, anchor_id, key_id, k, memory_budget = search
    ids = {"anchor_id": anchor_id, "key_id": key_id}
    found = top_k_negatives(anchors, keys, k, memory_budget=memory_budget, method=method, **ids)
    check(found, brute_force(anchors, keys, k, anchor_id, key_id), k)
    for i, index in enumerate(found.index):
        assert (key_id[index[index >= 0]] != anchor_id[i]).all()


@pytest.mark.parametrize("method", ["auto", "grouped"])
@pytest.mark.parametrize("guards", [{}, {"max_score": 0.3, "rank_min": 2}])
@given(search=searches(), widths=st.tuples(st.integers(1, 3), st.integers(1, 3)), num_captions=st.integers(1, 40))
def test_equal_captions_equal_brute_force(method, guards, search, widths, num_captions):
    """Several captions on each side, so that sharing one is not transitive; from one caption on all to hardly any shared."""
    anchors, keys, anchor_id, key_id, k, memory_budget = search
    captions = [
        torch.randint(-1, num_captions, (len(ids), w)) for ids, w in zip((anchor_id, key_id), widths, strict=True)
    ]
    options = {"anchor_captions": captions[0], "key_captions": captions[1], "memory_budget": memory_budget, **guards}
    found = top_k_negatives(anchors, keys, k, anchor_id=anchor_id, key_id=key_id, method=method, **options)
    allowed = allowed_pairs(anchor_id, key_id, *captions)
    expected = []
    for anchor, row in zip(anchors.double(), allowed, strict=True):
        scores = [(float(anchor @ key), -j) for j, key in enumerate(keys.double()) if row[j]]
        scores = [pair for pair in scores if pair[0] <= guards.get("max_score", 2)]
        expected.append(sorted(scores, reverse=True)[guards.get("rank_min", 0) :][:k])
    check(found, expected, k)
    assert all(allowed[i][j] for i, index in enumerate(found.index.tolist()) for j in index if j >= 0)


@pytest.mark.parametrize("kind", ["random", "cone", "clusters"])
@pytest.mark.parametrize("method", ["chunked", "grouped"])
@pytest.mark.parametrize("num_captions", [3, 500])
def test_equal_captions_in_a_larger_set(kind, method, num_captions):
    """The k + 64 nearest keys of most anchors share their caption with it, so that candidates run out."""
    anchors, keys, k = embeddings(kind, 60), embeddings(kind, 3000), 5
    key_captions = torch.full((3000, 1), num_captions)
    nearest = (anchors @ keys.T).argsort(dim=1, descending=True)
    anchor_captions = torch.arange(60)[:, None] % num_captions
    for anchor in range(60):
        key_captions[nearest[anchor, :200], 0] = anchor_captions[anchor]
    ids = {"anchor_id": torch.arange(60), "key_id": torch.arange(3000) + 60}
    captions = {"anchor_captions": anchor_captions, "key_captions": key_captions}
    found = top_k_negatives(anchors, keys, k, method=method, **ids, **captions)
    scores = (anchors @ keys.T).masked_fill(anchor_captions == key_captions.T, -torch.inf)
    torch.testing.assert_close(found.scores, scores.topk(k).values, atol=1e-6, rtol=0)
    assert (key_captions[found.index, 0] != anchor_captions).all()


def test_captions_need_each_other_and_ids():
    eye, ids, captions = torch.eye(2), torch.arange(2), torch.arange(2)[:, None]
    for options in (
        {"anchor_captions": captions, "anchor_id": ids, "key_id": ids},
        {"anchor_captions": captions, "key_captions": captions},
    ):
        with pytest.raises(ValueError, match="both `anchor_captions` and `key_captions`, beside both ids"):
            top_k_negatives(eye, eye, 1, **options)


@pytest.mark.parametrize("method", ["auto", "grouped"])
@given(
    search=searches(),
    rank_min=st.integers(0, 5),
    guard=st.sampled_from(["max_score", "absolute_margin", "relative_margin"]),
)
def test_guards_equal_brute_force(method, search, rank_min, guard):
    anchors, keys, anchor_id, key_id, k, memory_budget = search
    positive = 2 * torch.rand(len(anchors)) - 1
    ceiling = {
        "max_score": torch.full_like(positive, 0.3),
        "absolute_margin": positive - 0.3,
        "relative_margin": positive - 0.3 * positive.abs(),
    }[guard]
    found = top_k_negatives(
        anchors,
        keys,
        k,
        anchor_id=anchor_id,
        key_id=key_id,
        positive=None if guard == "max_score" else positive,
        rank_min=rank_min,
        memory_budget=memory_budget,
        method=method,
        **{guard: 0.3},
    )
    check(found, brute_force(anchors, keys, k, anchor_id, key_id, ceiling, rank_min), k)


@pytest.mark.parametrize("method", ["auto", "grouped"])
@pytest.mark.parametrize("kind", ["plain", "cone", "clusters"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_recall_where_bfloat16_chooses(kind, device, method):
    anchors, keys = embeddings(kind, 50).to(device), embeddings(kind, 8001).to(device)
    exact = anchors.double() @ keys.double().T
    found = top_k_negatives(anchors, keys, 100, memory_budget=1 << 20, method=method)
    kth = exact.topk(100).values[:, -1:]
    assert (exact.gather(1, found.index) >= kth - 1e-6).double().mean() >= 0.999
    torch.testing.assert_close(found.scores.double(), exact.topk(100).values, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["auto", "grouped"])
def test_matmul_precision_of_the_user_changes_nothing(method):
    anchors, keys = embeddings("cone", 40), embeddings("cone", 3000)
    expected = top_k_negatives(anchors, keys, 20, method=method)
    torch.set_float32_matmul_precision("medium")
    try:
        found = top_k_negatives(anchors, keys, 20, method=method)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found.index, expected.index)


@pytest.mark.parametrize("method", ["auto", "grouped"])
@pytest.mark.parametrize("kind", ["plain", "cone"])
@pytest.mark.parametrize("guard", [{}, {"max_score": 0.4}], ids=["", "guard"])
def test_chunks_change_nothing(kind, method, guard):
    """So any number of processes finds the same."""
    anchors, keys = embeddings(kind, 64), embeddings(kind, 5000)
    whole = top_k_negatives(anchors, keys, 50, method=method, **guard)
    parts = [
        top_k_negatives(part, keys, 50, memory_budget=1 << 16, method=method, **guard) for part in anchors.split(7)
    ]
    assert torch.equal(whole.index, torch.cat([part.index for part in parts]))
    assert torch.equal(whole.scores, torch.cat([part.scores for part in parts]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "`k` to be a positive integer, got 0"),
        ({"rank_min": -1}, "`rank_min` not to be negative, got -1"),
        ({"anchor_id": torch.arange(3)}, "both `anchor_id` and `key_id`, or neither"),
        ({"relative_margin": 0.05}, "Expected `positive`, .* for a margin; got None"),
        ({"anchors": torch.full((3, 4), torch.nan)}, "`anchors` to be finite"),
        ({"keys": torch.full((5, 4), torch.inf)}, "`keys` to be finite"),
    ],
)
def test_wrong_arguments(arguments, message):
    arguments = {"anchors": torch.ones(3, 4), "keys": torch.ones(5, 4), "k": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        top_k_negatives(**arguments)


@pytest.mark.parametrize("method", ["chunked", "grouped"])
def test_ids_that_need_64_bits(method):
    """Kernels compare ids in 32 bits where they fit; these do not."""
    anchors, keys = embeddings("plain", 40), embeddings("plain", 300)
    anchor_id, key_id = torch.arange(40) % 5, torch.arange(300) % 5
    near = top_k_negatives(anchors, keys, 9, anchor_id=anchor_id, key_id=key_id, method=method)
    far = top_k_negatives(anchors, keys, 9, anchor_id=anchor_id + 2**40, key_id=key_id + 2**40, method=method)
    assert torch.equal(near.index, far.index)
    assert (key_id[near.index] != anchor_id[:, None]).all()


def test_a_relative_margin_is_below_the_positive():
    """Also where that is negative."""
    ceiling = score_ceiling(torch.tensor([0.5, 0.0, -0.5]), relative_margin=0.1)
    torch.testing.assert_close(ceiling, torch.tensor([0.45, 0.0, -0.55]))
