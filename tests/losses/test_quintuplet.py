from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from lightning_itm import InfoNCELoss, QuintupletLoss, SigmoidLoss, TripletLoss
from lightning_itm.embeddings import EmbeddingPairs, HardNegatives
from lightning_itm.functional.quintuplet import OfflineScores, quintuplet_cost

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("aoq_*.npz"))
NAMES = ("image", "text", "hard_image", "hard_text", "hard_text_image", "hard_image_text")


def make_hard(vectors, image_id_of_text, image_id):
    return HardNegatives(
        text_embeddings=vectors["hard_text"],
        image_of_text_embeddings=vectors["hard_text_image"],
        image_id_of_text=torch.as_tensor(image_id_of_text),
        image_embeddings=vectors["hard_image"],
        text_of_image_embeddings=vectors["hard_image_text"],
        image_id=torch.as_tensor(image_id),
    )


def make_case(image_id, image_id_of_text, hard_image_id, seed=0, dim=4):
    torch.manual_seed(seed)
    n = len(image_id)
    vectors = {name: normalize(torch.randn(n, dim, dtype=torch.float64), dim=-1).requires_grad_() for name in NAMES}
    pairs = EmbeddingPairs(vectors["image"], vectors["text"], torch.as_tensor(image_id), torch.arange(n))
    return vectors, pairs, make_hard(vectors, image_id_of_text, hard_image_id)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_equals_the_published_code(path):
    golden = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
    vectors = {name: golden[name].requires_grad_() for name in NAMES}
    n = len(vectors["image"])
    pairs = EmbeddingPairs(vectors["image"], vectors["text"], torch.arange(n), torch.arange(n))
    hard = make_hard(vectors, torch.arange(n) + n, torch.arange(n) + 2 * n)
    loss = QuintupletLoss(
        TripletLoss(float(golden["margin_online"])),
        offline_margin=float(golden["margin_offline"]),
        alpha=float(golden["alpha"]),
        beta=float(golden["beta"]),
        as_published=True,
        reduction="sum",
    )
    value = loss(pairs, hard=hard)["loss"]
    value.backward()
    torch.testing.assert_close(value, golden["loss_sum"], atol=1e-10, rtol=0)
    for name in NAMES:
        torch.testing.assert_close(vectors[name].grad, golden[f"grad_{name}"], atol=1e-10, rtol=0)


def test_golden_files_are_there():
    assert len(GOLDEN) == 3


def loop(pairs, hard, margin, offline_margin, alpha, beta, clamp=False):
    """The quintuplet loss, one pair at a time, mean over anchors and directions."""

    def dot(a, b):
        return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))

    total, n = 0.0, len(pairs)
    for i in range(n):
        positive = dot(pairs.image_embeddings[i], pairs.text_embeddings[i])
        others = [j for j in range(n) if pairs.image_id[j] != pairs.image_id[i]]
        no_pair = hard.image_id[i] == hard.image_id_of_text[i] or min(hard.image_id[i], hard.image_id_of_text[i]) < 0
        image, text = pairs.image_embeddings[i], pairs.text_embeddings[i]
        hard_image, hard_text = hard.image_embeddings[i], hard.text_embeddings[i]
        i2t, t2i = (
            [dot(image, pairs.text_embeddings[j]) for j in others],
            [dot(text, pairs.image_embeddings[j]) for j in others],
        )
        directions = (
            (i2t, hard.image_id_of_text[i], (image, hard_text), (hard_image, hard_text)),
            (
                t2i,
                hard.image_id[i],
                (hard_image, text),
                (hard.image_of_text_embeddings[i], hard.text_of_image_embeddings[i]),
            ),
        )
        for negatives, mined_id, anchored, unanchored in directions:
            online = max([max(0.0, margin - positive + s) for s in negatives], default=0.0)
            if mined_id < 0:
                total += online
                continue
            weight = beta - ((dot(*anchored) - max(negatives)) / alpha if negatives else 0.0)
            total += (max(0.0, weight) if clamp else weight) * online
            total += max(0.0, offline_margin + dot(*anchored) - positive)
            total += 0.0 if no_pair else max(0.0, offline_margin + dot(*unanchored) - positive)
    return total / (2 * n)


IDS = st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 6), st.integers(-1, 6)), min_size=1, max_size=7)


@given(IDS, st.booleans(), st.integers(0, 1000))
def test_equals_the_loop(ids, clamp, seed):
    """Rows where nothing was mined, matched mined pairs, groups of one image, a batch of one."""
    vectors, pairs, hard = make_case(*(list(column) for column in zip(*ids, strict=True)), seed=seed)
    loss = QuintupletLoss(TripletLoss(0.3), offline_margin=0.1, alpha=0.2, beta=1.2, as_published=not clamp)
    value = loss(pairs, hard=hard)["loss"]
    value.backward()
    assert value.item() == pytest.approx(loop(pairs, hard, 0.3, 0.1, 0.2, 1.2, clamp), abs=1e-9)
    assert all(vectors[name].grad.isfinite().all() for name in NAMES)


def test_without_mined_negatives_it_is_the_online_loss():
    _, pairs, hard = make_case([0, 1, 2, 2], [-1] * 4, [-1] * 4)
    for negatives in ("hardest", "selective", "mean"):
        online = TripletLoss(0.4, negatives)
        loss = QuintupletLoss(online)
        assert loss(pairs)["loss"] == online(pairs)["loss"] == loss(pairs, hard=hard)["loss"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 0), (QuintupletLoss().options, 0), (QuintupletLoss(as_published=True).options, -0.1 / 0.3)],
    ids=["function", "loss", "published"],
)
def test_the_anchor_is_never_pulled_towards_its_mined_negative(options, expected):
    """The batch's negative costs, the mined one is easy. As published, the weight still has a gradient: the defect."""
    scores = torch.tensor([0.5, 0.4, -0.3], dtype=torch.float64)  # positive, the batch's negative, the mined one
    anchored = scores[2:].clone().requires_grad_()
    there = torch.tensor([True])
    offline = OfflineScores(anchored, torch.tensor([-1.0], dtype=torch.float64), there, there, ~there)
    cost = quintuplet_cost(
        0.2 - scores[:1] + scores[1:2],
        offline,
        positive=scores[:1],
        online_negative=scores[1:2],
        **options,
    )
    (gradient,) = torch.autograd.grad(cost.sum(), anchored, materialize_grads=True)
    assert gradient.item() == pytest.approx(expected)


@pytest.mark.parametrize(("options", "sign"), [({}, 0), ({"as_published": True}, -1)], ids=["default", "published"])
def test_a_violation_in_the_batch_is_never_rewarded(options, sign):
    """The mined negative is harder by more than 0.45, so that the published weight falls below 0."""
    negative = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    mined, there = torch.tensor([0.6], dtype=torch.float64), torch.tensor([True])
    positive = torch.tensor([0.2], dtype=torch.float64)
    offline = OfflineScores(mined, mined, there, ~there, ~there)
    online_cost = 0.2 - positive + negative
    cost = quintuplet_cost(
        online_cost, offline, positive=positive, online_negative=negative.detach(), **QuintupletLoss(**options).options
    )
    (gradient,) = torch.autograd.grad(cost.sum(), negative)
    assert gradient.sign().item() == sign


def test_stored_negatives_are_compared_with_the_stored_positive():
    """And two stored negatives with nothing: their term would have no gradient of its own, and pull on the live positive."""
    vectors, pairs, hard = make_case([0, 1], [5, 6], [7, -1], dim=6)
    earlier = [normalize(torch.randn(2, 6, dtype=torch.float64), dim=-1) for _ in range(2)]
    stored = replace(hard, positive=EmbeddingPairs(*earlier, pairs.image_id, pairs.text_id))
    online = TripletLoss(0.1)
    loss = QuintupletLoss(online, offline_margin=2.0, alpha=1e9, beta=1.0)  # w = 1
    i2t = 2.0 + (pairs.image_embeddings * (hard.text_embeddings - earlier[1])).sum(1)
    t2i = 2.0 + (pairs.text_embeddings * (hard.image_embeddings - earlier[0])).sum(1)
    expected = online(pairs)["loss"] + (i2t.sum() + t2i[0]) / 4  # nothing was mined for the second text
    value = loss(pairs, hard=stored)["loss"]
    torch.testing.assert_close(value, expected)
    gradients = torch.autograd.grad(value, [vectors["image"], vectors["text"]])
    for one, other in zip(gradients, torch.autograd.grad(expected, [vectors["image"], vectors["text"]]), strict=True):
        torch.testing.assert_close(one, other)


def test_true_pairs_among_the_mined_are_skipped():
    vectors, pairs, hard = make_case([0, 1], [5, 6], [5, 7])
    value = QuintupletLoss(offline_margin=2.0)(pairs, hard=hard)["loss"]
    value.backward()
    masked = vectors["hard_text_image"].grad
    assert (masked[0] == 0).all(), "its only term is with a text of its own image"
    assert (masked[1] != 0).any()
    assert QuintupletLoss(offline_margin=2.0, mask_matched=False)(pairs, hard=hard)["loss"] > value


@pytest.mark.parametrize("make_loss", [lambda: TripletLoss(0.5), lambda: InfoNCELoss(2.0), lambda: SigmoidLoss(2.0)])
def test_other_losses_take_them_as_candidates(make_loss):
    """As if the mined pairs had been in the batch, without being anchors; the id −1 is nobody's negative."""
    _, pairs, hard = make_case([0, 1, 2], [5, -1, 1], [7, 0, -1])
    loss = make_loss().double()
    mined = hard.as_pairs()
    there = mined.image_id >= 0
    extended = pairs + EmbeddingPairs(
        mined.image_embeddings[there], mined.text_embeddings[there], mined.image_id[there], mined.text_id[there]
    )
    assert loss(pairs, hard=hard)["loss"].item() == pytest.approx(loss(pairs, extended)["loss"].item())
    assert loss(pairs, hard=hard)["loss"] > loss(pairs)["loss"]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: QuintupletLoss(InfoNCELoss()), TypeError, "`online` to be a TripletLoss, got InfoNCELoss"),
        (lambda: QuintupletLoss(alpha=0), ValueError, "`alpha` to be positive, got 0"),
        (lambda: QuintupletLoss(offline_margin=-1), ValueError, "`offline_margin` not to be negative, got -1"),
    ],
)
def test_wrong_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_mined_pairs_of_one_caption_are_not_compared():
    """Hinge 3 leaves out row 0, whose T3 equals T4, but not row 1, whose captions are not known."""
    _, pairs, hard = make_case([0, 1], [5, 6], [7, 8], seed=3)
    captioned = replace(hard, caption_id=torch.tensor([4, -1]), caption_id_of_image=torch.tensor([4, -1]))
    same_image = replace(hard, image_id=torch.tensor([5, 8]))
    loss = QuintupletLoss(offline_margin=2.0)  # so large that every hinge costs something
    assert torch.equal(loss(pairs, hard=captioned)["loss"], loss(pairs, hard=same_image)["loss"])
    assert loss(pairs, hard=captioned)["loss"] < loss(pairs, hard=hard)["loss"]
    kept = QuintupletLoss(offline_margin=2.0, mask_matched=False)
    assert torch.equal(kept(pairs, hard=captioned)["loss"], kept(pairs, hard=hard)["loss"])


def test_a_mined_pair_of_the_anchors_caption_is_none():
    """Row 0 has a mined text of its own caption, row 1 a mined image with its own caption."""
    _, pairs, hard = make_case([0, 1], [5, 6], [7, 8], seed=3)
    captions = {"caption_id": torch.tensor([1, 5]), "caption_id_of_image": torch.tensor([6, 2])}
    loss = QuintupletLoss(offline_margin=2.0)
    value = loss(replace(pairs, caption_id=torch.tensor([1, 2])), hard=replace(hard, **captions))["loss"]
    without = replace(hard, image_id_of_text=torch.tensor([-1, 6]), image_id=torch.tensor([7, -1]))
    assert torch.equal(value, loss(pairs, hard=without)["loss"])
    assert value < loss(pairs, hard=replace(hard, **captions))["loss"]
