import torch

from lightning_itm.functional.top_k_search.candidates import largest


def test_the_largest_by_group_maxima():
    """The selection by group maxima, beside a plain one, where the number of columns does not divide."""
    scores = torch.randn(9, 16 * 40 + 7)
    assert torch.equal(largest(scores, 30), scores.topk(30).indices.sort(dim=1).values)
