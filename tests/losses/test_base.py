from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_itm import InfoNCELoss, SigmoidLoss, TripletLoss
from lightning_itm.embeddings import EmbeddingPairs
from tests.reference import losses as reference

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("selhn_*.npz"))
CASES = {
    "hardest": (lambda: TripletLoss(0.2, "hardest"), partial(reference.hardest, margin=0.2)),
    "mean": (lambda: TripletLoss(0.3, "mean"), partial(reference.mean, margin=0.3)),
    "selective": (
        lambda: TripletLoss(0.2, "selective", epsilon=0.3),
        partial(reference.selective, margin=0.2, epsilon=0.3),
    ),
    "info_nce": (lambda: InfoNCELoss(1.5), partial(reference.info_nce, scale=np.exp(1.5))),
    "sigmoid": (lambda: SigmoidLoss(1.5, -3.0), partial(reference.sigmoid, scale=np.exp(1.5), bias=-3.0)),
}


def make_pairs(num_pairs, dim=5, image_id=None, dtype=torch.float64):
    vectors = nn.functional.normalize(torch.randn(2, num_pairs, dim, dtype=dtype), dim=-1).requires_grad_()
    ids = torch.arange(num_pairs)
    return vectors, EmbeddingPairs(*vectors, ids if image_id is None else torch.as_tensor(image_id), ids)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_selective_equals_the_published_code(path):
    golden = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
    image, text = golden["image"].requires_grad_(), golden["text"].requires_grad_()
    ids = torch.arange(len(image))
    loss = TripletLoss(float(golden["margin"]), "selective", epsilon=float(golden["epsilon"]))
    outputs = loss(EmbeddingPairs(image, text, ids, ids))
    outputs["loss"].backward()
    torch.testing.assert_close(outputs["loss"], golden["loss"], atol=1e-10, rtol=0)
    torch.testing.assert_close(image.grad, golden["grad_image"], atol=1e-10, rtol=0)
    torch.testing.assert_close(text.grad, golden["grad_text"], atol=1e-10, rtol=0)
    assert float(outputs["averaged_fraction"]) == pytest.approx(float(golden["averaged_fraction"]))


def test_golden_files_are_there():
    assert len(GOLDEN) == 3


@pytest.mark.parametrize("name", CASES)
@given(image_id=st.lists(st.integers(0, 6), min_size=1, max_size=9), seed=st.integers(0, 1000))
def test_equals_the_loop(name, image_id, seed):
    """Random cosines, half of them negative; groups of several pairs an image, down to one pair and one image."""
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
    assert (value > 0) if name == "sigmoid" else (value == 0)


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


def test_info_nce_equals_open_clip():
    _, pairs = make_pairs(16)
    expected = open_clip.ClipLoss()(pairs.image_embeddings, pairs.text_embeddings, torch.tensor(10.0))
    torch.testing.assert_close(InfoNCELoss(np.log(10)).double()(pairs)["loss"], expected)


def test_sigmoid_equals_open_clip():
    _, pairs = make_pairs(16)
    expected = open_clip.loss.SigLipLoss()(
        pairs.image_embeddings, pairs.text_embeddings, torch.tensor(10.0), torch.tensor(-10.0)
    )
    torch.testing.assert_close(SigmoidLoss().double()(pairs)["loss"], expected)


class TestSwitch:
    @pytest.mark.parametrize("negatives", ["hardest", "selective"])
    def test_turns_the_rule_on_and_off(self, negatives):
        _, pairs = make_pairs(12)
        loss = TripletLoss(0.2, negatives, epsilon=0.5)
        on, off = torch.ones(12, dtype=torch.bool), torch.zeros(12, dtype=torch.bool)
        selective, hardest = TripletLoss(0.2, "selective", epsilon=0.5)(pairs), TripletLoss(0.2, "hardest")(pairs)
        assert 0 < selective["averaged_fraction"] < 1
        torch.testing.assert_close(loss(pairs, selective=on)["loss"], selective["loss"])
        torch.testing.assert_close(loss(pairs, selective=off)["loss"], hardest["loss"])
        assert loss(pairs, selective=off)["averaged_fraction"] == 0

    @pytest.mark.parametrize("loss", [TripletLoss(negatives="mean"), InfoNCELoss(), SigmoidLoss()])
    def test_is_refused_where_there_is_no_such_rule(self, loss):
        _, pairs = make_pairs(3)
        with pytest.raises(ValueError, match="no selective rule"):
            loss(pairs, selective=torch.ones(3, dtype=torch.bool))


def test_a_step_out_of_range_is_undone():
    loss = InfoNCELoss()
    with torch.no_grad():
        loss.logit_scale.fill_(7.0)
    _, pairs = make_pairs(4)
    outputs = loss(pairs)
    outputs["loss"].backward()
    assert outputs["logit_scale"].item() == pytest.approx(100)
    assert loss.logit_scale.grad != 0, "the scale can come back"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TripletLoss(negatives="hard"), "one of 'hardest', 'selective', 'mean', got 'hard'"),
        (lambda: TripletLoss(margin=-0.2), "`margin` to be positive, got -0.2"),
        (lambda: TripletLoss(epsilon=0), "`epsilon` to be positive, got 0"),
        (lambda: TripletLoss(reduction="none"), "one of 'mean', 'sum', got 'none'"),
        (lambda: InfoNCELoss(init_logit_scale=14.3), r"in \[0, ln 100 = 4.605\], got 14.3"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_embeddings_of_two_widths():
    ids = torch.arange(2)
    with pytest.raises(ValueError, match=r"got 3 \(image\) and 4 \(text\)"):
        EmbeddingPairs(torch.ones(2, 3), torch.ones(2, 4), ids, ids)


def test_rows_that_do_not_match():
    with pytest.raises(ValueError, match="one row a pair"):
        EmbeddingPairs(torch.ones(2, 3), torch.ones(3, 3), torch.arange(2), torch.arange(2))


def test_ids_that_are_no_integers():
    with pytest.raises(TypeError, match=r"`image_id` to be an int64 tensor of shape \(pairs,\), got torch.float32"):
        EmbeddingPairs(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2), torch.arange(2))
