import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_itm.functional import DirectionScores, hardest_cost, mean_cost, selective_cost
from tests.reference import losses as reference

MARGIN, EPSILON = 0.2, 0.3


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 1000))
def test_costs_equal_the_loop(num_anchors, num_candidates, seed):
    """Numbers that differ, cosines of both signs, and anchors without any negative."""
    torch.manual_seed(seed)
    similarity, positive = 2 * torch.rand(num_anchors, num_candidates).double() - 1, torch.rand(num_anchors).double()
    scores = DirectionScores(similarity, positive, torch.rand(num_anchors, num_candidates) < 0.6)
    found = {
        "hardest": hardest_cost(scores, margin=MARGIN),
        "mean": mean_cost(scores, margin=MARGIN),
        "selective": selective_cost(scores, margin=MARGIN, epsilon=EPSILON).cost,
    }
    for i in range(num_anchors):
        row = positive[i].item(), similarity[i][scores.negative_mask[i]].tolist()
        assert found["hardest"][i].item() == pytest.approx(reference.hardest(*row, MARGIN))
        assert found["mean"][i].item() == pytest.approx(reference.mean(*row, MARGIN))
        assert found["selective"][i].item() == pytest.approx(reference.selective(*row, MARGIN, EPSILON))


def test_nothing_is_averaged_where_it_is_not_enabled():
    flat = torch.full((2, 2), 0.5)
    scores = DirectionScores(flat, flat[0], ~torch.eye(2, dtype=torch.bool))
    result = selective_cost(scores, margin=MARGIN, epsilon=EPSILON, enabled=torch.tensor([True, False]))
    assert result.averaged.tolist() == [True, False]
