import math

import pytest
import torch

from lightning_itm.functional import DirectionScores, info_nce_cost, sigmoid_cost

SCALE, BIAS = torch.tensor(10.0).double(), torch.tensor(-3.0).double()
SIMILARITY = torch.tensor([[0.5, -0.2, 0.1], [-0.9, 0.3, 0.7]]).double()
POSITIVE = torch.tensor([0.4, -0.1]).double()


def test_a_weight_of_two_is_a_candidate_that_stands_there_twice():
    is_negative = torch.ones(2, 3, dtype=torch.bool)
    log_weight = torch.zeros(2, 3).double()
    log_weight[:, 2] = math.log(2)
    weighted = info_nce_cost(DirectionScores(SIMILARITY, POSITIVE, is_negative, log_weight), logit_scale=SCALE)
    twice = DirectionScores(SIMILARITY[:, [0, 1, 2, 2]], POSITIVE, torch.ones(2, 4, dtype=torch.bool))
    torch.testing.assert_close(weighted, info_nce_cost(twice, logit_scale=SCALE))


def test_an_anchor_without_negatives_pays_for_its_positive_alone():
    scores = DirectionScores(SIMILARITY, POSITIVE, torch.zeros(2, 3, dtype=torch.bool))
    assert info_nce_cost(scores, logit_scale=SCALE).tolist() == [0, 0]
    expected = [math.log1p(math.exp(-(10 * positive - 3))) for positive in POSITIVE.tolist()]
    assert sigmoid_cost(scores, logit_scale=SCALE, logit_bias=BIAS).tolist() == pytest.approx(expected)


def test_an_anchor_that_is_nearly_right_still_has_a_gradient():
    """At γ = 100 most costs are below 1e-7, what float32 can tell apart from a sum of about one."""
    positive = torch.tensor([0.5], requires_grad=True)
    scores = DirectionScores(torch.tensor([[0.3]]), positive, torch.ones(1, 1, dtype=torch.bool))
    cost = info_nce_cost(scores, logit_scale=torch.tensor(100.0))
    cost.sum().backward()
    assert cost.item() == pytest.approx(math.exp(-20), rel=1e-4)
    assert positive.grad.item() == pytest.approx(-100 * math.exp(-20), rel=1e-4)
