"""What every loss must do. A new loss gets its line in ``CASES``."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_itm import InfoNCELoss, SigmoidLoss, TripletLoss
from lightning_itm.embeddings import EmbeddingPairs, HardNegatives
from tests.helpers.pairs import make_pairs
from tests.reference import losses as reference

CASES = {
    "hardest": (lambda: TripletLoss(0.2, "hardest"), partial(reference.hardest, margin=0.2)),
    "mean": (lambda: TripletLoss(0.3, "mean"), partial(reference.mean, margin=0.3)),
    "selective": (
        lambda: TripletLoss(0.2, "selective", epsilon=0.3),
        partial(reference.selective, margin=0.2, epsilon=0.3),
    ),
    "info_nce": (lambda: InfoNCELoss(1.5), partial(reference.info_nce, scale=np.exp(1.5))),
    "sigmoid": (lambda: SigmoidLoss(1.5, -3.0), partial(reference.sigmoid, scale=np.exp(1.5), bias=-3.0)),
    "info_nce, hardness": (
        lambda: InfoNCELoss(1.5, hardness=4.0),
        partial(reference.info_nce, scale=np.exp(1.5), hardness=4.0),
    ),
    "info_nce, both": (
        lambda: InfoNCELoss(1.5, hardness=4.0, relative_margin=0.3),
        partial(reference.info_nce, scale=np.exp(1.5), hardness=4.0, relative_margin=0.3),
    ),
    "sigmoid, both": (
        lambda: SigmoidLoss(1.5, -3.0, hardness=4.0, relative_margin=0.3),
        partial(reference.sigmoid, scale=np.exp(1.5), bias=-3.0, hardness=4.0, relative_margin=0.3),
    ),
}


@pytest.mark.parametrize("name", CASES)
@given(image_id=st.lists(st.integers(0, 6), min_size=1, max_size=9), seed=st.integers(0, 1000))
def test_equals_the_loop(name, image_id, seed):
    """Random cosines, half of them negative; groups of several pairs per image, down to one pair and one image."""
    make_loss, anchor_cost = CASES[name]
    torch.manual_seed(seed)
    vectors, pairs = make_pairs(len(image_id), image_id=image_id)
    loss = make_loss().double()
    value = loss(pairs)["loss"]
    value.backward()
    expected = reference.loss(
        pairs.image_embeddings.detach(), pairs.text_embeddings.detach(), pairs.image_id, anchor_cost
    )
    assert value.item() == pytest.approx(expected, abs=1e-6)
    assert torch.isfinite(vectors.grad).all()


@pytest.mark.parametrize("name", CASES)
@given(ids=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=9), seed=st.integers(0, 1000))
def test_equals_the_loop_with_equal_captions(name, ids, seed):
    make_loss, anchor_cost = CASES[name]
    torch.manual_seed(seed)
    image_id, caption_id = torch.tensor(ids).T
    vectors, pairs = make_pairs(len(ids), image_id=image_id)
    pairs = replace(pairs, caption_id=caption_id)
    value = make_loss().double()(pairs)["loss"]
    value.backward()
    image, text = pairs.image_embeddings.detach(), pairs.text_embeddings.detach()
    assert value.item() == pytest.approx(reference.loss(image, text, image_id, anchor_cost, caption_id), abs=1e-6)
    assert torch.isfinite(vectors.grad).all()


@pytest.mark.parametrize("name", CASES)
def test_captions_that_are_not_known_change_nothing(name):
    _, pairs = make_pairs(7, image_id=[0, 0, 1, 2, 3, 4, 5])
    unknown = replace(pairs, caption_id=torch.full((7,), -1))
    loss = CASES[name][0]().double()
    assert torch.equal(loss(unknown)["loss"], loss(pairs)["loss"])


@pytest.mark.parametrize("name", CASES)
def test_sum_is_the_mean_times_all_anchors(name):
    loss = CASES[name][0]()
    _, pairs = make_pairs(7)
    mean = loss(pairs)["loss"]
    loss.reduction = "sum"
    torch.testing.assert_close(loss(pairs)["loss"], 14 * mean)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("image_id", [[0], [0, 0, 0]], ids=["batch of one", "pairs of one image"])
def test_without_any_negative(name, image_id):
    """Hinges and InfoNCE have nothing to do; the sigmoid still pulls the positives."""
    vectors, pairs = make_pairs(len(image_id), image_id=image_id)
    value = CASES[name][0]().double()(pairs)["loss"]
    value.backward()
    assert torch.isfinite(vectors.grad).all()
    assert (value > 0) if "sigmoid" in name else (value == 0)


@pytest.mark.parametrize("name", CASES)
def test_candidates_may_be_more_than_the_anchors(name):
    loss = CASES[name][0]().double()
    _, everything = make_pairs(9, image_id=[0, 0, 1, 2, 2, 2, 3, 4, 0])
    image, text, image_id, text_id = (
        everything.image_embeddings,
        everything.text_embeddings,
        everything.image_id,
        everything.text_id,
    )
    parts = [
        EmbeddingPairs(image[rows], text[rows], image_id[rows], text_id[rows]) for rows in torch.arange(9).split(3)
    ]
    value = sum(loss(part, everything)["loss"] for part in parts) / 3
    torch.testing.assert_close(value, loss(everything)["loss"])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_is_float32_under_autocast(name, device):
    loss = CASES[name][0]().to(device)
    _, pairs = make_pairs(64, dim=128, dtype=torch.float32)
    pairs = EmbeddingPairs(
        *(getattr(pairs, field).to(device) for field in ("image_embeddings", "text_embeddings", "image_id", "text_id"))
    )
    expected = loss(pairs)["loss"]
    with torch.autocast(device, dtype=torch.bfloat16):
        value = loss(pairs)["loss"]
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("loss", [TripletLoss(negatives="mean"), InfoNCELoss(), SigmoidLoss()])
def test_a_switch_is_refused_where_there_is_no_rule(loss):
    _, pairs = make_pairs(3)
    with pytest.raises(ValueError, match="no selective rule"):
        loss(pairs, selective=torch.ones(3, dtype=torch.bool))


def test_an_unknown_reduction():
    with pytest.raises(ValueError, match="one of 'mean', 'sum', got 'none'"):
        TripletLoss(reduction="none")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_ids_of_fewer_bits(name, dtype):
    """In a batch of a user's own loader. Beside mined negatives, some of which are missing and have the id −1."""
    _, pairs = make_pairs(4, image_id=[0, 0, 1, 2], dtype=torch.float32)
    narrow = EmbeddingPairs(
        pairs.image_embeddings, pairs.text_embeddings, pairs.image_id.to(dtype), pairs.text_id.to(dtype)
    )
    _, mined = make_pairs(4, dtype=torch.float32)
    other = torch.tensor([3, -1, 0, -1])
    texts, images = mined.text_embeddings, mined.image_embeddings
    hard = HardNegatives(texts, images, other, images, texts, other)
    loss = CASES[name][0]()
    assert torch.equal(loss(narrow, hard=hard)["loss"], loss(pairs, hard=hard)["loss"])


@pytest.mark.parametrize("name", CASES)
def test_a_mined_pair_of_the_anchors_caption_is_no_negative(name):
    """The mined text 3 equals the text of the pair 1, and stands among the candidates of all pairs."""
    _, pairs = make_pairs(2)
    pairs = replace(pairs, caption_id=torch.tensor([0, 1]))
    _, mined = make_pairs(4)
    texts, images = mined.text_embeddings, mined.image_embeddings
    other = torch.tensor([8, 9])
    rows = texts[:2], images[:2], other, images[2:], texts[2:], other + 2
    captions = {"caption_id": torch.tensor([1, 6]), "caption_id_of_image": torch.tensor([-1, 7])}
    loss = CASES[name][0]().double()
    value = loss(pairs, hard=HardNegatives(*rows, **captions))["loss"]
    everything = EmbeddingPairs(
        torch.cat([pairs.image_embeddings, images]),
        torch.cat([pairs.text_embeddings, texts]),
        torch.tensor([0, 1, 8, 9, 10, 11]),
        torch.arange(6),
        torch.tensor([0, 1, 1, 6, -1, 7]),
    )
    assert value.item() == pytest.approx(loss(pairs, everything)["loss"].item())
