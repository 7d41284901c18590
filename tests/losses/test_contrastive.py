import math

import numpy as np
import open_clip
import pytest
import torch

from lightning_itm import InfoNCELoss, SigmoidLoss
from lightning_itm.embeddings import HardNegatives
from lightning_itm.functional import DirectionScores
from tests.helpers.pairs import make_pairs


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


def test_a_step_out_of_range_is_undone():
    loss = InfoNCELoss()
    with torch.no_grad():
        loss.logit_scale.fill_(7.0)
    _, pairs = make_pairs(4)
    outputs = loss(pairs)
    outputs["loss"].backward()
    assert outputs["logit_scale"].item() == pytest.approx(100)
    assert loss.logit_scale.grad != 0, "the scale can come back"


@pytest.mark.parametrize("make_loss", [InfoNCELoss, SigmoidLoss])
def test_only_the_batch_trains_scale_and_bias(make_loss):
    """What was mined as embeddings changes the gradients of the towers, and not those of scale and bias."""
    vectors, pairs = make_pairs(4)
    (_, mined), (_, positive) = make_pairs(4), make_pairs(4)
    rows = mined.text_embeddings.detach(), mined.image_embeddings.detach()
    hard = HardNegatives(*rows, torch.arange(4, 8), *rows[::-1], torch.arange(4, 8), positive=positive)
    loss = make_loss().double()
    inputs = [vectors, *loss.parameters()]
    alone, beside = (torch.autograd.grad(loss(pairs, hard=part)["loss"], inputs) for part in (None, hard))
    assert not torch.allclose(alone[0], beside[0])
    assert all(torch.equal(one, two) and one != 0 for one, two in zip(alone[1:], beside[1:], strict=True))


def test_a_start_out_of_range():
    with pytest.raises(ValueError, match=r"in \[0, ln 100 = 4.605\], got 14.3"):
        InfoNCELoss(init_logit_scale=14.3)


@pytest.mark.parametrize("make_loss", [InfoNCELoss, SigmoidLoss])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hardness": -1.0}, r"`hardness` to be at least 0, got -1.0"),
        ({"hardness": float("nan")}, r"`hardness` to be at least 0, got nan"),
        ({"relative_margin": 1.0}, r"`relative_margin` to be in \[0, 1\), got 1.0"),
        ({"relative_margin": -0.1}, r"`relative_margin` to be in \[0, 1\), got -0.1"),
    ],
)
def test_hardness_and_margin_out_of_range(make_loss, options, message):
    with pytest.raises(ValueError, match=message):
        make_loss(**options)


@pytest.mark.parametrize("make_loss", [InfoNCELoss, SigmoidLoss])
def test_the_weight_of_hard_negatives_has_no_gradient_of_its_own(make_loss):
    """With a gradient through the weight, that of each negative would be larger by the factor (γ + β) / γ."""
    _, pairs = make_pairs(5)
    loss = make_loss(math.log(10), hardness=4.0).double()
    similarity = (pairs.image_embeddings @ pairs.text_embeddings.T).detach()
    log_weight = (4.0 * similarity).requires_grad_()
    scores = DirectionScores(similarity.requires_grad_(), similarity.diagonal(), ~torch.eye(5, dtype=torch.bool))
    own = loss.direction_cost(scores, None).cost.sum()
    (of_own,) = torch.autograd.grad(own, similarity)
    by_hand = make_loss(math.log(10)).double().direction_cost(scores._replace(log_weight=log_weight), None).cost.sum()
    of_similarity, of_weight = torch.autograd.grad(by_hand, [similarity, log_weight])
    torch.testing.assert_close(own, by_hand)
    torch.testing.assert_close(of_own, of_similarity)
    assert of_weight.abs().max() > 0
