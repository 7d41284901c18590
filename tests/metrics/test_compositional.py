import pytest
import torch
from torch.nn.functional import normalize

from lightning_itm.metrics import CompositionalAccuracy


def vectors(number, dim=5):
    return normalize(torch.randn(number, dim), dim=1)


def test_equals_a_loop_in_each_category():
    image, right, wrong, category = vectors(20), vectors(20), vectors(20), torch.arange(20) % 3
    metric = CompositionalAccuracy(["a", "b", "c", "none"])
    for rows in torch.randperm(20).split(6):
        metric.update(image[rows], right[rows], wrong[rows], item_id=rows, category=category[rows])
    is_right = torch.tensor([float(i @ r > i @ w) for i, r, w in zip(image, right, wrong, strict=True)])
    values = metric.compute()
    assert set(values) == {"accuracy", "a", "b", "c"}
    assert float(values["accuracy"]) == pytest.approx(100 * float(is_right.mean()))
    for number, name in enumerate("abc"):
        assert float(values[name]) == pytest.approx(100 * float(is_right[category == number].mean()))


def test_a_collapsed_model_scores_nothing():
    """All vectors are equal, up to rounding, in whatever order a sum is taken."""
    point = vectors(1, 512)
    metric = CompositionalAccuracy()
    metric.update(point.expand(9, -1), point.expand(9, -1), point.expand(9, -1).clone(), item_id=torch.arange(9))
    assert float(metric.compute()["accuracy"]) == 0


def test_an_item_that_comes_twice_counts_once():
    eye, metric = torch.eye(2), CompositionalAccuracy()
    metric.update(eye, eye, eye.roll(1, 0), item_id=torch.tensor([0, 1]))
    metric.update(eye[:1], eye.roll(1, 0)[:1], eye[:1], item_id=torch.tensor([1]))
    assert float(metric.compute()["accuracy"]) == 100


def test_errors():
    eye, ids = torch.eye(2), torch.arange(2)
    with pytest.raises(ValueError, match="at least one category"):
        CompositionalAccuracy([])
    with pytest.raises(ValueError, match="at least one batch before `compute`"):
        CompositionalAccuracy().compute()
    with pytest.raises(ValueError, match=r"one shape \(items, dim\), got .* with 3 ids"):
        CompositionalAccuracy().update(eye, eye, eye, item_id=torch.arange(3))
    metric = CompositionalAccuracy()
    metric.update(eye * torch.nan, eye, eye, item_id=ids)
    with pytest.raises(ValueError, match="NaN or infinity in 2 of 2 items, the first 0"):
        metric.compute()
