import torch

from lightning_itm.functional import direction_scores, hardest_negative, negative_mask, unit_norm


def test_unit_norm_keeps_zeros_and_precision():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    for dtype, expected in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        result = unit_norm(rows.to(dtype))
        assert result.dtype == expected
        assert result.norm(dim=1).tolist() == [1, 0]


def test_scores_are_float32_under_autocast():
    """In bfloat16 these two candidates would be equally similar."""
    anchor, candidates = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.0], [0.501, 0.0]])
    ids = torch.tensor([0, 1, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = direction_scores(anchor, anchor, candidates, anchor_id=ids[:1], candidate_id=ids[1:])
    assert scores.similarity.tolist() == candidates[:, :1].T.tolist()
    assert scores.similarity.dtype == torch.float32


def test_the_hardest_is_a_negative_or_none():
    """More candidates than anchors, all similarities negative, and an anchor whose image has every candidate."""
    anchor, candidates = -torch.eye(2), torch.tensor([[0.6, 0.8], [0.8, 0.6], [1.0, 0.0]])
    candidate_id = torch.tensor([7, 7, -1])
    mask = negative_mask(torch.tensor([5, 7]), candidate_id)
    assert mask.tolist() == [[True, True, False], [False, False, False]]
    scores = direction_scores(anchor, anchor, candidates, anchor_id=torch.tensor([5, 7]), candidate_id=candidate_id)
    torch.testing.assert_close(hardest_negative(scores), torch.tensor([-0.6, -torch.inf]))


def test_a_row_of_zeros_has_no_huge_gradient():
    """Divided by a small number instead of one, it would be 1e12 and ruin the step of all others."""
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    (unit_norm(rows) * torch.tensor([[0.0, 5.0], [2.0, -3.0]])).sum().backward()
    assert rows.grad[1].tolist() == [2, -3]
    torch.testing.assert_close(rows.grad[0], torch.tensor([-0.48, 0.36]))


def test_a_candidate_of_the_same_caption_is_no_negative():
    """Whatever its image is. A caption that is not known, −1, is equal to no other."""
    anchor_caption, candidate_caption = torch.tensor([4, -1]), torch.tensor([4, 5, -1, 5])
    mask = negative_mask(torch.tensor([0, 1]), torch.tensor([7, 8, 9, 0]), anchor_caption, candidate_caption)
    assert mask.tolist() == [[False, True, True, False], [True, True, True, True]]
