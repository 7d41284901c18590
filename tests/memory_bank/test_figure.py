from dataclasses import replace

import pytest
import torch

from lightning_itm import FalseNegativeSampler
from lightning_itm.functional.false_negatives import false_negative_posterior
from lightning_itm.memory_bank import MemoryBank, plot_similarities
from lightning_itm.memory_bank.figure import MAX_PAIRS, _similarities
from tests.helpers.memory import make_pairs

NUM_PAIRS, DIM = 40, 16


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_bank(num_pairs=NUM_PAIRS, size=NUM_PAIRS):
    bank = MemoryBank(size, DIM)
    bank.enqueue(make_pairs(num_pairs, DIM, dtype=torch.float32))
    return bank


class TestPlotSimilarities:
    def test_draws_densities_posterior_and_histograms(self):
        sampler = FalseNegativeSampler(posterior="published", threshold=1e-3, prior=1e-2)
        sampler.observe(make_pairs(NUM_PAIRS, DIM))
        left, right = plot_similarities(make_bank(), sampler).axes
        for drawn in left.patches:
            heights, edges, _ = drawn.get_data()
            assert (heights * (edges[1:] - edges[:-1])).sum() == pytest.approx(1, abs=1e-3)
        assert len(left.patches) == 2
        assert len(left.lines) == 2
        for line in left.lines:  # densities, each with nearly all of its area in view
            x, y = line.get_data()
            assert 0.9 < torch.trapezoid(torch.as_tensor(y), torch.as_tensor(x)) < 1.001
        posterior, threshold = right.lines
        x, y = (torch.as_tensor(values) for values in posterior.get_data())
        expected = false_negative_posterior(x, **sampler.statistics.fit()._asdict(), prior=1e-2)
        torch.testing.assert_close(y, expected)
        assert set(threshold.get_ydata()) == {1e-3}

    def test_before_any_statistics_it_draws_the_queue_alone(self):
        left, _ = plot_similarities(make_bank(), FalseNegativeSampler()).axes
        assert len(left.patches) == 2
        assert len(left.lines) == 0

    def test_empty_places_are_left_out(self):
        """Zeros would stand as a bar at a cosine of 0."""
        left, _ = plot_similarities(make_bank(2, size=NUM_PAIRS), FalseNegativeSampler()).axes
        heights = [patch.get_data()[0] for patch in left.patches]
        assert all(1 <= (height > 0).sum() <= 2 for height in heights)

    def test_takes_only_so_many_pairs_of_a_large_queue(self):
        """The similarities of all pairs of a queue of 65,536 would need 17 GB."""
        bank = make_bank(2 * MAX_PAIRS, size=2 * MAX_PAIRS)
        bank.image[MAX_PAIRS:] = torch.nan
        left, _ = plot_similarities(bank, FalseNegativeSampler()).axes
        assert all(torch.as_tensor(patch.get_data()[0]).isfinite().all() for patch in left.patches)

    def test_pairs_of_one_caption_are_no_negatives(self):
        """All 40 pairs have one of two captions, so that half of the pairs of pairs are drawn as negatives."""
        bank = MemoryBank(NUM_PAIRS, DIM)
        pairs = make_pairs(NUM_PAIRS, DIM, dtype=torch.float32)
        bank.enqueue(replace(pairs, caption_id=torch.arange(NUM_PAIRS) % 2))
        negatives, positives = _similarities(bank)
        assert (len(negatives), len(positives)) == (NUM_PAIRS**2 // 2, NUM_PAIRS)
