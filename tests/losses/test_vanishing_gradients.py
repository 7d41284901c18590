"""Why the hardest negative gets stuck: the gradients of one hinge, and of a batch that has collapsed."""

import pytest
import torch
from torch.nn.functional import normalize

from lightning_itm import TripletLoss
from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.functional import DirectionScores, hardest_cost

MARGIN = 0.2


@pytest.mark.parametrize("seed", range(5))
def test_gradients_of_one_hinge(seed):
    """With v = x_v / |x_v|: of the anchor [(t̂ − t) − (s⁻ − s⁺) v] / |x_v|, of the positive −(v − s⁺ t) / |x_t|.

    And of the negative (v − s⁻ t̂) / |x_t̂|.
    """
    generator = torch.Generator().manual_seed(seed)
    anchor, positive, negative = (
        torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)
    )
    v, t, hard = (normalize(x, dim=0) for x in (anchor, positive, negative))
    scores = DirectionScores((v @ hard).view(1, 1), (v @ t).view(1), torch.ones(1, 1, dtype=torch.bool))
    cost = hardest_cost(scores, margin=3.0).sum()  # active whatever the similarities
    gradients = torch.autograd.grad(cost, (anchor, positive, negative))
    with torch.no_grad():
        expected = (
            ((hard - t) - (v @ hard - v @ t) * v) / anchor.norm(),
            -(v - (v @ t) * t) / positive.norm(),
            (v - (v @ hard) * hard) / negative.norm(),
        )
    for got, formula in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, formula, atol=1e-14, rtol=0)


def collapsed(eta, seed=0):
    """Embeddings within about η of one point."""
    generator = torch.Generator().manual_seed(seed)
    common = normalize(torch.randn(16, generator=generator, dtype=torch.float64), dim=0)
    noise = torch.randn(2, 40, 16, generator=generator, dtype=torch.float64) / 4
    return (common + eta * noise).requires_grad_()


def loss_of(x, negatives):
    ids = torch.arange(40)
    return TripletLoss(MARGIN, negatives)(EmbeddingPairs(*normalize(x, dim=-1), ids, ids))["loss"]


@pytest.mark.parametrize("negatives", ["hardest", "mean"])
def test_the_gradient_is_of_the_order_of_the_distance(negatives):
    """And the loss is the margin: it is the distance that both gradients have as a factor, not the loss."""
    ratios = []
    for eta in (1e-1, 1e-2, 1e-3, 1e-4):
        x = collapsed(eta)
        loss = loss_of(x, negatives)
        (gradient,) = torch.autograd.grad(loss, x)
        assert abs(loss.item() - MARGIN) < 2 * eta
        ratios.append(float(gradient.norm()) / eta)
    assert ratios[2] == pytest.approx(ratios[3], rel=0.01)
    assert ratios[1] == pytest.approx(ratios[3], rel=0.05)


def test_equal_similarities_alone_do_not_zero_the_gradient():
    """s⁺ = s⁻ with a negative that is not the positive: the anchor's gradient is their difference, of length √2 here."""
    anchor = torch.tensor([1.0, 0, 0], dtype=torch.float64, requires_grad=True)
    positive, negative = (torch.tensor(x, dtype=torch.float64) for x in ([0, 1.0, 0], [0, 0, 1.0]))
    scores = DirectionScores(
        (anchor @ negative).view(1, 1), (anchor @ positive).view(1), torch.ones(1, 1, dtype=torch.bool)
    )
    (gradient,) = torch.autograd.grad(hardest_cost(scores, margin=MARGIN).sum(), anchor)
    assert float(gradient.norm()) == pytest.approx(2**0.5)


@pytest.mark.parametrize("seed", range(5))
def test_the_hardest_contracts_and_the_mean_expands(seed):
    """Ten steps down the gradient of each, from the same collapse; the norms say nothing of it."""
    after = {}
    for negatives in ("hardest", "mean"):
        x = collapsed(1e-2, seed)
        before = spread(x)
        for _ in range(10):
            (gradient,) = torch.autograd.grad(loss_of(x, negatives), x)
            x = (x - gradient).detach().requires_grad_()
        after[negatives] = spread(x)
    assert after["hardest"] < 0.95 * before
    assert after["mean"] > 1.05 * before


def spread(x):
    embeddings = normalize(x.detach().flatten(0, 1), dim=1)
    return (1 - normalize(embeddings.mean(0), dim=0) @ embeddings.T).mean().item()
