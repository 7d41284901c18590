"""Which way of the search is taken, and what it may cost."""

import pytest
import torch

from lightning_itm.functional import top_k_negatives
from lightning_itm.functional.top_k_search import ways as searching
from tests.helpers.embeddings import embeddings


@pytest.mark.parametrize("kind", ["plain", "clusters"])
def test_groups_choose_and_do_not_only_give_up(kind, monkeypatch):
    """Few anchors are searched again where keys differ; where hundreds are alike, all may be, in float32."""
    find, searched = searching.Exact.find, []

    def count(way, anchors, *arguments):
        searched.append(len(anchors))
        return find(way, anchors, *arguments)

    monkeypatch.setattr(searching.Exact, "find", count)
    anchors, keys = embeddings(kind, 200), embeddings(kind, 20_001)
    top_k_negatives(anchors, keys, 30, method="grouped")
    assert (sum(searched) < 20) == (kind == "plain")


@pytest.mark.parametrize("kind", ["plain", "cone", "clusters"])
@pytest.mark.parametrize(
    "guard", [{"relative_margin": 0.05}, {"absolute_margin": 0.0}, {"max_score": torch.inf}, {"max_score": -torch.inf}]
)
def test_a_guard_in_bfloat16_leaves_out_what_float32_does(kind, guard, monkeypatch):
    """Where matches are clear, most anchors need no float32; the negatives are the same in any case."""
    anchors = embeddings(kind, 200)
    keys = torch.cat(
        [torch.nn.functional.normalize(anchors + 0.02 * torch.randn_like(anchors)), embeddings(kind, 9000)]
    )
    ids, key_id, positive = torch.arange(200), torch.arange(len(keys)), (anchors * keys[:200]).sum(dim=1)
    find, searched = searching.Exact.find, []

    def count(way, anchors, *arguments):
        searched.append(len(anchors))
        return find(way, anchors, *arguments)

    monkeypatch.setattr(searching.Exact, "find", count)
    found = {}
    for is_fast in (True, False):
        searched.clear()
        monkeypatch.setattr(searching, "multiplies_bfloat16", lambda _, is_fast=is_fast: is_fast)
        options = {"anchor_id": ids, "key_id": key_id, "positive": positive, "memory_budget": 1 << 22}
        found[is_fast] = top_k_negatives(anchors, keys, 30, **options, **guard)
        assert is_fast or sum(searched) == 200
        assert not is_fast or kind == "clusters" or sum(searched) < 100
    assert torch.equal(found[True].index, found[False].index)
    assert torch.equal(found[True].scores, found[False].scores)


@pytest.mark.parametrize(("k", "num_keys"), [(300, 566_435), (60, 566_435), (300, 113_287), (60, 113_287), (5, 100)])
def test_group_size(k, num_keys):
    """By throwing k keys into the groups at random: rarely as many in one as are kept of it."""
    size = searching.group_size(k, num_keys)
    num_groups = -(-num_keys // size)
    group = (
        torch.rand(500, num_keys).topk(k).indices % num_groups
        if num_keys <= 100
        else torch.randint(num_groups, (500, k))
    )
    meets = torch.stack([torch.bincount(row, minlength=num_groups).amax() >= searching._DEPTH for row in group])
    assert meets.double().mean() <= 0.01 or size == 2


@pytest.mark.parametrize(("num_anchors", "num_keys", "k"), [(113_287, 566_435, 300), (566_435, 113_287, 60)])
def test_memory_at_the_size_of_coco(num_anchors, num_keys, k):
    """Beyond the embeddings: keys in bfloat16, twice, a chunk of the best of each group, candidates, and the result, twice."""
    budget, dim = 1 << 30, 512
    num_groups, candidates = -(-num_keys // searching.group_size(k, num_keys)), k + searching._NUM_SPARE
    rows = min(searching._MAX_GROUPED_ROWS, budget // 2 // (4 * (searching._DEPTH + 1) * num_groups))
    best = rows * num_groups * 4 * searching._DEPTH
    among_first = rows * num_groups * 4  # what topk may copy
    members = rows * candidates * (searching._DEPTH * 3 + 6) * 8  # scores, places and order, as int64 at most
    low_keys, result = 2 * num_keys * dim * 2, 2 * num_anchors * k * (4 + 8)
    assert rows >= 128, "or the kernel's tiles would be empty in part"
    assert best + among_first <= budget // 2
    assert budget + members + low_keys + result < 4e9
