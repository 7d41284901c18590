import math

import torch

from lightning_itm.functional import DirectionScores
from lightning_itm.functional.posterior import NUM_BINS, similarity_bin
from lightning_itm.memory_bank import SimilarityHistograms
from lightning_itm.memory_bank.similarity_histograms import WINDOW


def make_scores(num_anchors=6, num_candidates=50):
    similarity = torch.rand(num_anchors, num_candidates) * 2 - 1
    return DirectionScores(similarity, torch.rand(num_anchors), torch.rand(num_anchors, num_candidates) < 0.8)


def count(scores):
    return SimilarityHistograms.count(scores, similarity_bin(scores.similarity))


def test_counts_are_sums_over_rows():
    """Chunks of the rows, and the rows of other ranks, add up."""
    scores = make_scores()
    parts = [DirectionScores(*(part[rows] for part in scores[:3])) for rows in (slice(0, 2), slice(2, 6))]
    assert torch.equal(count(parts[0]) + count(parts[1]), count(scores))
    assert count(scores).sum(1).tolist() == [6, int(scores.negative_mask.sum())]


def test_an_anchor_without_negatives_does_not_count():
    scores = make_scores()
    scores.negative_mask[2] = False  # as where its stored positive is not finite
    assert count(scores)[0].sum() == 5


def test_old_counts_decay_with_the_number_of_positives_not_of_steps():
    one, many = SimilarityHistograms(), SimilarityHistograms()
    first, later = torch.ones(2, NUM_BINS), torch.zeros(2, NUM_BINS)
    later[0, 300], later[1, 300] = WINDOW, 100 * WINDOW
    for histograms, num_steps in ((one, 1), (many, 64)):
        histograms.add(first)
        histograms.update()
        for _ in range(num_steps):
            histograms.add(later / num_steps)
            histograms.update()
        assert abs(histograms.candidates[0].item() - math.exp(-1)) < 1e-9


def test_the_posterior_waits_for_the_update():
    histograms = SimilarityHistograms()
    histograms.add(count(make_scores()))
    assert histograms.num_positives() == 0
    assert (histograms.posterior == 0).all()
    histograms.update()
    assert histograms.num_positives() == 6
    assert histograms.posterior.max() > 0
    histograms.reset()
    assert all((buffer == 0).all() for buffer in histograms.buffers())
