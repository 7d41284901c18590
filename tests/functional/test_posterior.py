import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_itm.functional import histogram_posterior
from lightning_itm.functional.posterior import NUM_BINS, count_bins, similarity_bin

EDGES = torch.linspace(-1, 1, NUM_BINS + 1, dtype=torch.float64)


def normal_counts(mean, std, number):
    """How many of ``number`` normally distributed similarities fall into each bin, on average."""
    return number * torch.special.ndtr((EDGES - mean) / std).diff()


def pooled_ratio(numerator, denominator):
    """Pool adjacent bins until their ratios never fall, bin by bin."""
    blocks = []
    for a, b in zip(numerator.tolist(), denominator.tolist(), strict=True):
        blocks.append([a, b, 1])
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] >= blocks[-1][0] * blocks[-2][1]:
            a, b, size = blocks.pop()
            blocks[-1] = [blocks[-1][0] + a, blocks[-1][1] + b, blocks[-1][2] + size]
    return torch.tensor([a / b for a, b, size in blocks for _ in range(size)], dtype=torch.float64)


@given(num_bins=st.integers(1, 40), seed=st.integers(0, 1000))
def test_equals_pooling_of_adjacent_bins(num_bins, seed):
    generator = torch.Generator().manual_seed(seed)
    positives = torch.randint(0, 30, (num_bins,), generator=generator).double()
    positives[-1] += 1
    candidates = torch.randint(1, 300, (num_bins,), generator=generator).double()
    tails = [(candidates[t:].sum() / candidates.sum(), positives[t:].sum() / positives.sum()) for t in range(num_bins)]
    fraction = min(float(a / b) for a, b in tails if b >= 0.5)
    expected = pooled_ratio(positives * fraction * candidates.sum() / positives.sum(), candidates).clamp(max=1)
    torch.testing.assert_close(histogram_posterior(positives, candidates), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("prior", [1e-5, 1e-3, 0.05])
def test_finds_the_matching_fraction_by_itself(prior):
    """Against Bayes' rule with the true fraction and the true densities."""
    match, other = normal_counts(0.7, 0.06, prior * 1e9), normal_counts(0.1, 0.08, (1 - prior) * 1e9)
    found = histogram_posterior(normal_counts(0.7, 0.06, 1e4), match + other)
    expected = match / (match + other).clamp_min(1e-30)
    is_between = (EDGES[1:] > 0.1) & (EDGES[1:] < 0.9)
    torch.testing.assert_close(found[is_between], expected[is_between], atol=1e-3, rtol=0)


def test_candidates_that_never_match_are_not_likely_to():
    found = histogram_posterior(normal_counts(0.7, 0.06, 1e4), normal_counts(0.1, 0.06, 1e6))
    assert found.max() < 0.01


@given(seed=st.integers(0, 1000), num_positives=st.integers(0, 50), num_candidates=st.integers(0, 5000))
def test_is_a_probability_that_never_falls(seed, num_positives, num_candidates):
    generator = torch.Generator().manual_seed(seed)
    positives, candidates = (
        similarity_bin(torch.rand(number, generator=generator) * 2 - 1).bincount(minlength=NUM_BINS).double()
        for number in (num_positives, num_candidates)
    )
    found = histogram_posterior(positives, candidates)
    assert found.isfinite().all()
    assert found.min() >= 0
    assert found.max() <= 1
    assert (found.diff() >= 0).all()
    if min(num_positives, num_candidates) == 0:
        assert (found == 0).all()


def test_a_few_candidates_at_the_top_are_exact_in_float32_beside_a_hundred_million():
    """MPS has no float64. Sums that start at the bottom would round the top away."""
    match, other = normal_counts(0.7, 0.02, 50), normal_counts(0.0, 0.05, 1e9)
    positives, candidates = normal_counts(0.7, 0.02, 1000), match + other
    exact, rounded = (histogram_posterior(positives.to(t), candidates.to(t)) for t in (torch.float64, torch.float32))
    assert exact.max() > 0.9
    torch.testing.assert_close(rounded.double(), exact, atol=1e-3, rtol=0)


def test_bins_cover_all_cosines():
    similarity = torch.tensor([-1.1, -1.0, -0.9951, -0.9949, 0.0, 0.9951, 1.0, 1.0001])
    assert similarity_bin(similarity).tolist() == [0, 0, 0, 1, 200, 399, 399, 399]


def test_counts_what_counts():
    similarity, counts = torch.rand(30, 20) * 2 - 1, torch.rand(30, 20) < 0.5
    found = count_bins(similarity_bin(similarity), counts)
    expected = torch.histc(similarity[counts].double(), NUM_BINS, -1, 1)
    assert found.sum() == counts.sum()
    torch.testing.assert_close(found.cumsum(0), expected.cumsum(0), atol=1, rtol=0)  # one may be rounded over an edge
