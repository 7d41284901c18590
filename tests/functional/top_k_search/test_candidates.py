import pytest
import torch

from lightning_itm.functional.top_k_search.candidates import most_extreme


@pytest.mark.parametrize("largest", [True, False])
def test_the_most_extreme_by_group_maxima(largest):
    """The selection by group maxima, beside a plain one, where the number of columns does not divide."""
    scores = torch.randn(9, 16 * 40 + 7)
    expected = scores.topk(30, largest=largest).indices.sort(dim=1).values
    assert torch.equal(most_extreme(scores, 30, largest=largest), expected)
