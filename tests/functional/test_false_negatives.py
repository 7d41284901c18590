import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_itm.functional import (
    DirectionScores,
    draw_negative,
    false_negative_posterior,
    negative_mask,
    sampling_weights,
)
from tests.helpers.golden import GOLDEN, golden_steps
from tests.reference import false_negatives as reference

MEAN, STD = st.floats(-1, 1), st.floats(-4, 0).map(lambda exponent: 10**exponent)
STATISTICS = st.builds(
    lambda a, b, c, d: {"positive_mean": a, "positive_var": b**2, "negative_mean": c, "negative_var": d**2},
    *(MEAN, STD, MEAN, STD),
)
GRID = torch.cat([torch.linspace(-1, 1, 2001), torch.randn(500, generator=torch.Generator().manual_seed(1)).tanh()])
ORDINARY = {"positive_mean": 0.65, "positive_var": 0.05**2, "negative_mean": 0.4, "negative_var": 0.08**2}


def golden_directions(step):
    """Anchors, their momentum positives, candidates, for image to text and text to image."""
    for kind, other, direction in (("image", "text", "i2t"), ("text", "image", "t2i")):
        candidates = torch.cat([step[f"momentum_{other}"], step[f"queue_{other}"]])
        similarity = step[kind] @ candidates.T
        positive = (step[kind] * step[f"momentum_{other}"]).sum(dim=1)
        ids = torch.cat([step["image_id"], step["queue_image_id"]])
        yield DirectionScores(similarity, positive, negative_mask(step["image_id"], ids)), step[f"weights_{direction}"]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_weights_equal_the_published_code(path):
    num_fallbacks = 0
    for settings, step in golden_steps(path):
        for scores, expected in golden_directions(step):
            posterior = false_negative_posterior(
                scores.similarity,
                positive_mean=step["pos_mean"],
                positive_var=step["pos_var"],
                negative_mean=step["neg_mean"],
                negative_var=step["neg_var"],
                prior=settings["prior"],
            )
            weights = sampling_weights(
                scores,
                posterior if step["pos_count"] > settings["min_count"] else torch.zeros_like(posterior),
                sharpness=settings["tau"],
                threshold=settings["posterior_threshold"],
                cut=(step["pos_mean"] - settings["margin"]),
            )
            has_weight = weights.sum(dim=1) > 0
            torch.testing.assert_close(weights[has_weight], expected[has_weight], atol=1e-9, rtol=0)
            # A row without weight: all on its costliest negative, or, if none costs anything, on any.
            drawn = draw_negative(scores, weights, torch.rand(len(weights)))
            assert torch.equal(drawn.is_fallback, ~has_weight)
            theirs, ours = expected.argmax(dim=1), drawn.candidate_index
            cost = (settings["margin"] - scores.positive[:, None] + scores.similarity).clamp_min(0)
            cost[~scores.negative_mask] = 0
            costly = ~has_weight & (cost.amax(dim=1) > 0)
            assert torch.equal(theirs[costly], ours[costly])
            free = ~has_weight & ~costly
            assert (cost[free].gather(1, ours[free, None]) == 0).all()
            num_fallbacks += int(costly.sum())
    assert num_fallbacks > 10


def test_golden_files_are_there():
    assert len(GOLDEN) == 2


class TestPosterior:
    @given(statistics=STATISTICS, prior=st.floats(1e-8, 0.5), monotone=st.booleans())
    def test_is_finite_everywhere(self, statistics, prior, monotone):
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            posterior = false_negative_posterior(GRID.to(dtype), **statistics, prior=prior, monotone=monotone)
            assert posterior.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert posterior.isfinite().all()
            assert ((posterior >= 0) & (posterior <= 1)).all()

    @given(statistics=STATISTICS, prior=st.floats(1e-8, 0.5))
    def test_equals_the_definition(self, statistics, prior):
        """In float32 up to what the rounding of the similarity itself, to 2^-24, makes of it."""
        for s in (
            -1.0,
            -0.37,
            0.0,
            0.2,
            0.41,
            0.6,
            0.83,
            1.0,
            statistics["positive_mean"],
            statistics["negative_mean"],
        ):
            exact = torch.tensor(s, dtype=torch.float64)
            expected = reference.posterior(s, **statistics, prior=prior)
            assert false_negative_posterior(exact, **statistics, prior=prior).item() == pytest.approx(
                expected, abs=1e-6
            )
            around = [
                reference.posterior(s + shift, **statistics, prior=prior) for shift in (-2e-7, -1e-7, 0, 1e-7, 2e-7)
            ]
            value = false_negative_posterior(exact.float(), **statistics, prior=prior).item()
            assert min(around) - 1e-6 <= value <= max(around) + 1e-6

    @given(statistics=STATISTICS, prior=st.floats(1e-8, 0.5))
    def test_monotone_never_falls(self, statistics, prior):
        """Up to the last two bits of a float32."""
        similarity = GRID.sort().values
        posterior = false_negative_posterior(similarity, **statistics, prior=prior, monotone=True)
        assert posterior.diff().min() >= -(2.0**-22)
        assert (posterior[similarity < statistics["negative_mean"]] == 0).all()

    def test_monotone_is_the_highest_so_far(self):
        similarity = torch.linspace(0.4, 1, 300, dtype=torch.float64)
        plain, monotone = (false_negative_posterior(similarity, **ORDINARY, monotone=value) for value in (False, True))
        assert plain.diff().min() < -1e-3
        torch.testing.assert_close(monotone, plain.cummax(dim=0).values, atol=1e-4, rtol=0)

    def test_where_a_ratio_of_densities_is_not_a_number(self):
        similarity = torch.linspace(-1, 1, 25)
        std = 0.02
        densities = [torch.exp(-0.5 * ((similarity - mean) / std) ** 2) / std for mean in (0.5, 0.2)]
        ratio = 1e-4 * densities[0] / (1e-4 * densities[0] + (1 - 1e-4) * densities[1])
        assert ratio.isnan().sum() >= 10
        posterior = false_negative_posterior(
            similarity, positive_mean=0.5, positive_var=std**2, negative_mean=0.2, negative_var=std**2
        )
        assert posterior.isfinite().all()

    def test_equal_fits_give_the_prior(self):
        posterior = false_negative_posterior(
            GRID, positive_mean=0.3, positive_var=0.01, negative_mean=0.3, negative_var=0.01, prior=0.01
        )
        torch.testing.assert_close(posterior, torch.full_like(GRID, 0.01))

    def test_no_variance_at_all(self):
        posterior = false_negative_posterior(
            GRID, positive_mean=0.0, positive_var=0.0, negative_mean=0.0, negative_var=0.0
        )
        torch.testing.assert_close(posterior, torch.full_like(GRID, 1e-4))

    @pytest.mark.parametrize("prior", [0.0, 1.0, -1e-4, math.nan])
    def test_a_prior_that_is_none(self, prior):
        with pytest.raises(ValueError, match=f"Expected `prior` to be between 0 and 1, got {prior}"):
            false_negative_posterior(GRID, **ORDINARY, prior=prior)


def make_scores(num_anchors, num_candidates, seed, num_images=5):
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.rand(num_anchors, num_candidates, generator=generator, dtype=torch.float64) * 2 - 1
    ids = [torch.randint(-1, num_images, (n,), generator=generator) for n in (num_anchors, num_candidates)]
    positive = torch.rand(num_anchors, generator=generator, dtype=torch.float64)
    return DirectionScores(similarity, positive, negative_mask(ids[0].clamp_min(0), ids[1]))


class TestWeightsAndDraws:
    @given(
        size=st.tuples(st.integers(1, 5), st.integers(1, 12)),
        seed=st.integers(0, 1000),
        weighting=st.sampled_from(["exp", "complement", "drop"]),
        cut=st.sampled_from([None, -0.3, 0.5, 2.0]),
    )
    def test_equal_the_loop(self, size, seed, weighting, cut):
        scores = make_scores(*size, seed)
        posterior = false_negative_posterior(scores.similarity, **ORDINARY)
        options = {"sharpness": 0.7, "threshold": 0.05, "weighting": weighting}
        limit = None if cut is None else torch.tensor(cut, dtype=torch.float64)
        weights = sampling_weights(scores, posterior, **options, cut=limit)
        numbers = torch.rand(size[0], generator=torch.Generator().manual_seed(seed))
        drawn = draw_negative(scores, weights, numbers)
        for i, row in enumerate(scores.similarity.tolist()):
            is_negative = scores.negative_mask[i].tolist()
            expected = [
                reference.weight(
                    s,
                    scores.positive[i].item(),
                    is_negative[j],
                    reference.posterior(s, **ORDINARY, prior=1e-4),
                    **options,
                    cut=cut,
                )
                for j, s in enumerate(row)
            ]
            assert weights[i].tolist() == pytest.approx(expected, abs=1e-9)
            place = reference.draw(expected, numbers[i].item())
            if place is None:
                place = max((j for j in range(len(row)) if is_negative[j]), key=row.__getitem__, default=None)
                assert bool(drawn.is_fallback[i]) == (place is not None)
            assert bool(drawn.is_negative[i]) == any(is_negative)
            assert place is None or drawn.candidate_index[i] == place

    def test_draws_come_in_proportion_to_the_weights(self):
        """Numbers at even distances: each candidate is drawn as often as its share says, up to one."""
        weights = torch.tensor([0.0, 0.2, 0.0, 1.0, 0.5, 0.3, 0.0])
        number = 1000
        scores = DirectionScores(torch.zeros(number, 7), torch.zeros(number), torch.ones(number, 7, dtype=torch.bool))
        drawn = draw_negative(scores, weights.expand(number, 7), (torch.arange(number) + 0.5) / number)
        counts = torch.bincount(drawn.candidate_index, minlength=7)
        assert ((counts - number * weights / weights.sum()).abs() <= 1).all()
        assert not drawn.is_fallback.any()

    @given(seed=st.integers(0, 1000))
    def test_what_weighs_nothing_is_never_drawn(self, seed):
        """Also at the very edges, and where a running sum of float32 cannot tell small weights apart."""
        generator = torch.Generator().manual_seed(seed)
        weights = torch.rand(8, 3000, generator=generator) * 10 ** torch.randint(-9, 6, (8, 3000), generator=generator)
        weights[torch.rand(8, 3000, generator=generator) < 0.7] = 0
        weights[:, -5:] = 0
        numbers = torch.tensor([0.0, 1 - 2**-24, 0.5, 1 - 2**-24, 0.0, 0.1, 0.9, 1 - 2**-23])
        scores = DirectionScores(weights, torch.zeros(8), torch.ones(8, 3000, dtype=torch.bool))
        drawn = draw_negative(scores, weights, numbers)
        assert (weights.gather(1, drawn.candidate_index[:, None]) > 0).all()

    def test_a_similarity_that_is_not_a_number_weighs_nothing(self):
        scores = make_scores(3, 6, 0)
        scores.similarity[:, 2] = torch.nan
        posterior = false_negative_posterior(scores.similarity, **ORDINARY)
        weights = sampling_weights(scores, posterior, cut=torch.tensor(-2.0))
        assert (weights[:, 2] == 0).all()
        assert weights.isfinite().all()

    def test_weights_have_no_gradient(self):
        similarity = torch.rand(2, 3, requires_grad=True)
        scores = DirectionScores(similarity, similarity[:, 0], torch.ones(2, 3, dtype=torch.bool))
        posterior = false_negative_posterior(similarity, **ORDINARY)
        for weighting in ("exp", "complement", "drop"):
            assert not sampling_weights(scores, posterior, weighting=weighting).requires_grad
