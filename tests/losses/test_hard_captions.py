"""Captions without an image, as further negatives of their own image."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_itm import InfoNCELoss, QuintupletLoss, SigmoidLoss, TripletLoss
from lightning_itm.embeddings import HardCaptions, HardNegatives
from tests.helpers.memory import make_memory, unit
from tests.helpers.pairs import make_pairs
from tests.reference import losses as reference

CASES = {
    "hardest": (lambda: TripletLoss(0.2, "hardest"), partial(reference.hardest, margin=0.2)),
    "mean": (lambda: TripletLoss(0.3, "mean"), partial(reference.mean, margin=0.3)),
    "selective": (
        lambda: TripletLoss(0.2, "selective", epsilon=0.3),
        partial(reference.selective, margin=0.2, epsilon=0.3),
    ),
    "quintuplet": (lambda: QuintupletLoss(TripletLoss(0.2)), partial(reference.hardest, margin=0.2)),
    "info_nce": (lambda: InfoNCELoss(1.5), partial(reference.info_nce, scale=np.exp(1.5))),
    "info_nce, hardness": (
        lambda: InfoNCELoss(1.5, hardness=4.0),
        partial(reference.info_nce, scale=np.exp(1.5), hardness=4.0),
    ),
    "sigmoid": (lambda: SigmoidLoss(1.5, -3.0), partial(reference.sigmoid, scale=np.exp(1.5), bias=-3.0)),
}
MARGINS = {
    "info_nce": (lambda: InfoNCELoss(1.5, relative_margin=0.3), CASES["info_nce"][1]),
    "sigmoid": (lambda: SigmoidLoss(1.5, -3.0, relative_margin=0.3), CASES["sigmoid"][1]),
}


def make_captions(num_pairs, num_captions, dim=5):
    vectors = unit(num_pairs, num_captions, dim).requires_grad_()
    return vectors, HardCaptions(vectors, torch.rand(num_pairs, num_captions) < 0.6)


def expected_loss(pairs, captions, anchor_cost, relative_margin=None):
    images, texts, vectors = pairs.image_embeddings, pairs.text_embeddings, captions.text_embeddings
    similarity, ids = (images @ texts.T).tolist(), pairs.image_id.tolist()
    costs = []
    for i, own_id in enumerate(ids):
        positive = similarity[i][i]
        of_texts = [similarity[i][j] for j, other in enumerate(ids) if other != own_id]
        of_images = [similarity[j][i] for j, other in enumerate(ids) if other != own_id]
        own = [float(images[i] @ vectors[i, k]) for k in range(vectors.shape[1]) if captions.mask[i, k]]
        costs.append(anchor_cost(positive, reference.kept(positive, of_texts, relative_margin) + own))
        costs.append(anchor_cost(positive, reference.kept(positive, of_images, relative_margin)))
    return sum(costs) / len(costs)


@pytest.mark.parametrize("name", CASES)
@given(image_id=st.lists(st.integers(0, 6), min_size=1, max_size=9), num=st.integers(1, 4), seed=st.integers(0, 1000))
def test_equals_the_loop(name, image_id, num, seed):
    make_loss, anchor_cost = CASES[name]
    torch.manual_seed(seed)
    leaves, pairs = make_pairs(len(image_id), image_id=image_id)
    vectors, captions = make_captions(len(image_id), num)
    value = make_loss().double()(pairs, hard_captions=captions)["loss"]
    value.backward()
    with torch.no_grad():
        assert value.item() == pytest.approx(expected_loss(pairs, captions, anchor_cost), abs=1e-6)
    assert torch.isfinite(leaves.grad).all()
    assert (vectors.grad[~captions.mask] == 0).all(), "what the mask leaves out has no part in the loss"


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("seed", range(3))
def test_a_guard_against_likely_matches_keeps_them(name, seed):
    make_loss, anchor_cost = MARGINS[name]
    torch.manual_seed(seed)
    _, pairs = make_pairs(6)
    _, captions = make_captions(6, 3)
    with torch.no_grad():
        value = make_loss().double()(pairs, hard_captions=captions)["loss"].item()
        assert value == pytest.approx(expected_loss(pairs, captions, anchor_cost, 0.3), abs=1e-6)


def mined(num_pairs):
    vectors = [unit(num_pairs, 6) for _ in range(4)]
    none = torch.arange(num_pairs) + 20
    return HardNegatives(vectors[0], vectors[1], none, vectors[2], vectors[3], none + num_pairs)


@pytest.mark.parametrize("loss", [InfoNCELoss(1.5), SigmoidLoss(1.5, -3.0), TripletLoss(0.3, "mean")])
def test_beside_mining_and_a_memory_bank(loss):
    """Images gain a term. Texts have the costs that they had."""
    torch.manual_seed(0)
    _, pairs = make_pairs(5, dim=6)
    _, captions = make_captions(5, 2, dim=6)
    captions.mask[3] = False

    def costs(some):
        torch.manual_seed(1)  # of the memory bank and its draws
        return loss.double().costs(pairs, pairs, memory=make_memory(pairs), hard=mined(5), hard_captions=some)

    before, after = costs(None), costs(captions)
    assert torch.equal(before[1].cost, after[1].cost)
    assert torch.equal(before[0].cost != after[0].cost, captions.mask.any(dim=1))


@pytest.mark.parametrize("loss", [TripletLoss(memory="instead"), QuintupletLoss(TripletLoss(memory="instead"))])
def test_a_memory_bank_that_replaces_the_batch(loss):
    _, pairs = make_pairs(5, dim=6)
    _, captions = make_captions(5, 2, dim=6)
    with pytest.raises(ValueError, match=r"a memory bank that replaces the batch, got both. .*memory='added'"):
        loss(pairs, memory=make_memory(pairs), hard_captions=captions)


def test_shapes():
    with pytest.raises(ValueError, match=r"got \(2, 3, 4\) and torch.bool \(2, 2\)"):
        HardCaptions(torch.ones(2, 3, 4), torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"torch.int64 \(2, 3\)"):
        HardCaptions(torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.int64))
