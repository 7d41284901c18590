from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.memory_bank import SimilarityStatistics, similarity_statistics
from tests.helpers.golden import GOLDEN, golden_steps
from tests.helpers.memory import make_pairs


def observed(batches):
    """Every value that counts, by loops over nested lists."""
    positive, negative = [], []
    for pairs in batches:
        ids, similarity = pairs.image_id.tolist(), (pairs.image_embeddings @ pairs.text_embeddings.T).tolist()
        captions = [f"of pair {i}" for i in ids] if pairs.caption_id is None else pairs.caption_id.tolist()
        for i in range(len(ids)):
            others = [j for j in range(len(ids)) if ids[j] != ids[i] and captions[j] != captions[i]]
            if not others:
                continue
            hardest = max(similarity[i][j] for j in others), max(similarity[j][i] for j in others)
            if similarity[i][i] > max(hardest):
                positive.append(similarity[i][i])
                negative += hardest
    return torch.tensor(positive, dtype=torch.float64), torch.tensor(negative, dtype=torch.float64)


class TestStatistics:
    @given(
        sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8),
        num_captions=st.sampled_from([None, 2, 9]),
        seed=st.integers(0, 1000),
    )
    def test_equal_two_passes_over_everything(self, sizes, num_captions, seed):
        torch.manual_seed(seed)
        statistics = SimilarityStatistics()
        batches = [make_pairs(size, image_id=torch.randint(0, 20, (size,)), noise=0.6) for size in sizes]
        if num_captions is not None:
            batches = [replace(b, caption_id=torch.randint(0, num_captions, (len(b),))) for b in batches]
        for pairs in batches:
            statistics.update(pairs)
        fit = statistics.fit()
        for values, count, mean, var in zip(observed(batches), statistics.count, fit[::2], fit[1::2], strict=True):
            assert count == len(values)
            if len(values) > 1:
                torch.testing.assert_close(mean, values.mean(), atol=1e-12, rtol=0)
                torch.testing.assert_close(var, values.var(), atol=1e-12, rtol=0)

    def test_exact_where_the_spread_is_a_millionth_of_the_mean(self):
        statistics = SimilarityStatistics()
        values = 0.9 + 1e-6 * torch.randn(2, 5000, dtype=torch.float64)
        for part in values.split(37, dim=1):
            statistics.merge(part, torch.ones_like(part, dtype=torch.bool))
        torch.testing.assert_close(statistics.fit().positive_var, values[0].var(), atol=0, rtol=1e-9)

    @pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
    def test_published(self, path):
        """Means and counts equal; the published variance leaves out how the mean moves, and is smaller by some percent."""
        statistics, deviations, ratios = SimilarityStatistics(), torch.zeros(2, dtype=torch.float64), []
        for _, step in golden_steps(path):
            # Published: whatever is off the diagonal is a negative.
            ids = torch.arange(len(step["image"]))
            pairs = EmbeddingPairs(step["image"], step["text"], ids, ids)
            statistics.update(pairs)
            fit = statistics.fit()
            for place, (kind, values) in enumerate(zip(("pos", "neg"), observed([pairs]), strict=True)):
                mean, var, count = fit[2 * place], fit[2 * place + 1], statistics.count[place]
                assert count == step[f"{kind}_count"]
                torch.testing.assert_close(mean, step[f"{kind}_mean"], atol=1e-12, rtol=0)
                deviations[place] += (values - mean).square().sum()  # from the mean so far, as published
                torch.testing.assert_close(deviations[place] / (count - 1), step[f"{kind}_var"], atol=1e-12, rtol=0)
                ratios.append(var / step[f"{kind}_var"])
        assert min(ratios) > 1 - 1e-9
        assert max(ratios) > 1.01

    def test_values_that_are_not_finite_do_not_count(self):
        pairs = make_pairs(6)
        pairs.image_embeddings[2] = torch.nan
        statistics = SimilarityStatistics()
        statistics.update(pairs)
        assert statistics.fit().positive_mean.isfinite()

    def test_parts_of_the_rows_change_nothing(self, monkeypatch):
        pairs = make_pairs(20, image_id=torch.randint(0, 9, (20,)), noise=0.6)
        whole, parts = SimilarityStatistics(), SimilarityStatistics()
        whole.update(pairs)
        monkeypatch.setitem(similarity_statistics.CHUNK_ELEMENTS, "cpu", 60)  # three rows
        parts.update(pairs)
        assert whole.count[0] > 0
        for a, b in zip(whole.buffers(), parts.buffers(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)

    def test_a_collapse_counts_nothing(self):
        pairs = EmbeddingPairs(torch.ones(5, 1), torch.ones(5, 1), torch.arange(5), torch.arange(5))
        statistics = SimilarityStatistics()
        statistics.update(pairs)
        assert statistics.count.tolist() == [0, 0]
