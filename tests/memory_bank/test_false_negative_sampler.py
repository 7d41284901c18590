from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from lightning_itm import FalseNegativeSampler, TripletLoss
from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.functional.false_negatives import DrawnNegative, false_negative_posterior
from lightning_itm.memory_bank import MemoryCandidates, similarity_statistics
from tests.helpers.golden import GOLDEN, golden_steps
from tests.helpers.memory import make_memory, make_pairs, unit


class Heaviest(FalseNegativeSampler):
    """Take each anchor's heaviest candidate instead of a draw, as the golden files do."""

    def draw(self, direction, *, margin):
        scores = direction.scores()
        weights, diagnostics = self.weights(scores, margin=margin)
        hardest = scores.similarity.masked_fill(~scores.negative_mask, -torch.inf)
        has_weight = weights.sum(dim=1) > 0
        index = torch.where(has_weight, weights.argmax(dim=1), hardest.argmax(dim=1))
        return DrawnNegative(index, scores.negative_mask.any(dim=1), ~has_weight), diagnostics

    def observe(self, candidates):
        """The file's statistics are put in instead."""


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_loss_and_gradients_equal_the_published_code(path):
    for settings, step in golden_steps(path):
        sampler = Heaviest(
            posterior="published",
            prior=settings["prior"],
            sharpness=settings["tau"],
            threshold=settings["posterior_threshold"],
            min_count=settings["min_count"],
        )
        counts = torch.stack([step["pos_count"], step["neg_count"]]).double()
        sampler.statistics.count.copy_(counts)
        sampler.statistics.mean.copy_(torch.stack([step["pos_mean"], step["neg_mean"]]))
        sampler.statistics.deviation.copy_(torch.stack([step["pos_var"], step["neg_var"]]) * (counts - 1))
        image, text = step["image"].requires_grad_(), step["text"].requires_grad_()
        ids = step["image_id"]
        pairs = EmbeddingPairs(image, text, ids, torch.arange(len(ids)))
        slow = EmbeddingPairs(step["momentum_image"], step["momentum_text"], ids, pairs.text_id)
        memory = MemoryCandidates(
            torch.cat([slow.image_embeddings, step["queue_image"]]),
            torch.cat([slow.text_embeddings, step["queue_text"]]),
            image_id := torch.cat([ids, step["queue_image_id"]]),
            torch.ones_like(image_id, dtype=torch.bool),
            slow,
            sampler,
        )
        value = 2 * TripletLoss(settings["margin"], memory="instead")(pairs, memory=memory)["loss"]
        value.backward()
        torch.testing.assert_close(value, step["loss_at_argmax"], atol=1e-9, rtol=0)
        torch.testing.assert_close(image.grad, step["grad_image"], atol=1e-9, rtol=0)
        torch.testing.assert_close(text.grad, step["grad_text"], atol=1e-9, rtol=0)


class TestSampler:
    def setup_method(self):
        torch.manual_seed(3)
        self.pairs = make_pairs(16, dim=8)
        self.sampler = FalseNegativeSampler(posterior="published", min_count=2)
        self.sampler.observe(self.pairs)
        self.memory = make_memory(self.pairs, 50, sampler=self.sampler, num_images=40)

    def draws(self, sampler=None, pairs=None, memory=None, margin=0.2):
        directions = (memory or self.memory).directions(pairs or self.pairs)
        return [(sampler or self.sampler).draw(direction, margin=margin) for direction in directions]

    def test_never_draws_the_same_image_or_an_empty_place(self):
        for step in range(30):
            self.sampler.start_step(0, step)
            for drawn, _ in self.draws():
                assert self.memory.valid[drawn.candidate_index].all()
                assert (self.memory.image_id[drawn.candidate_index] != self.pairs.image_id).all()

    def test_a_draw_is_a_function_of_epoch_step_and_text(self):
        def drawn(step, rows=slice(None)):
            self.sampler.start_step(0, step)
            part = EmbeddingPairs(
                *(
                    getattr(self.pairs, name)[rows]
                    for name in ("image_embeddings", "text_embeddings", "image_id", "text_id")
                )
            )
            positive = self.memory.positive
            positive = EmbeddingPairs(
                positive.image_embeddings[rows], positive.text_embeddings[rows], part.image_id, part.text_id
            )
            memory = replace(self.memory, positive=positive)
            return [found.candidate_index for found, _ in self.draws(pairs=part, memory=memory)]

        again, other = drawn(3), drawn(4)
        assert all(torch.equal(a, b) for a, b in zip(drawn(3), again, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(other, again, strict=True))
        halves = [drawn(3, slice(0, 8)), drawn(3, slice(8, 16))]
        assert torch.equal(torch.cat([half[0] for half in halves]), again[0])

    def test_chunks_change_nothing(self, monkeypatch):
        whole = self.draws()
        monkeypatch.setitem(similarity_statistics.CHUNK_ELEMENTS, "cpu", 100)  # one row
        for (drawn, watched), (expected, expected_watched) in zip(self.draws(), whole, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))
            assert torch.equal(watched["fallback_fraction"], expected_watched["fallback_fraction"])

    def test_diagnostics_are_shares_of_the_negatives(self):
        direction = self.memory.directions(self.pairs)[0]
        scores, fit = direction.scores(), self.sampler.statistics.fit()
        posterior = false_negative_posterior(scores.similarity, **fit._asdict())[scores.negative_mask]
        _, watched = self.sampler.draw(direction, margin=0.2)
        assert watched["mean_posterior"].mean().item() == pytest.approx(posterior.mean().item(), abs=1e-7)
        share = (posterior > 1e-3).float().mean().item()
        assert watched["false_negative_rate"].mean().item() == pytest.approx(share, abs=1e-7)
        assert share > 0

    def test_posteriors_wait_for_enough_positives(self):
        self.sampler.min_count = int(self.sampler.statistics.count[0])
        assert all((watched["mean_posterior"] == 0).all() for _, watched in self.draws())
        self.sampler.min_count -= 1
        assert all((watched["mean_posterior"] > 0).any() for _, watched in self.draws())

    def test_statistics_are_of_one_epoch(self):
        self.sampler.start_step(0, 7)
        assert self.sampler.statistics.count[0] > 0
        self.sampler.start_step(1, 0)
        assert self.sampler.statistics.count[0] == 0

    @pytest.mark.parametrize("cut_down", ["global", "per_anchor", "off"])
    def test_cut_down(self, cut_down):
        self.sampler.cut_down = cut_down
        for direction in self.memory.directions(self.pairs):
            scores = direction.scores()
            weights, _ = self.sampler.weights(scores, margin=0.2)
            limit = {
                "global": self.sampler.statistics.mean[0].expand(16),
                "per_anchor": scores.positive,
                "off": torch.full((16,), 3.0),
            }[cut_down] - 0.2
            above = torch.ones_like(scores.negative_mask) if cut_down == "off" else scores.similarity > limit[:, None]
            assert torch.equal(weights > 0, above & scores.negative_mask)
            assert (self.sampler.weights(scores, margin=None)[0] > 0)[scores.negative_mask].all()

    def test_before_any_count_the_cut_is_minus_the_margin(self):
        sampler = FalseNegativeSampler()
        scores = self.memory.directions(self.pairs)[0].scores()
        weights, _ = sampler.weights(scores, margin=0.2)
        assert torch.equal(weights > 0, scores.negative_mask & (scores.similarity > -0.2))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"prior": 0.0}, "`prior` to be between 0 and 1, got 0.0"),
            ({"threshold": 1.0}, "`threshold` to be between 0 and 1, got 1.0"),
            ({"sharpness": -1.0}, "`sharpness` not to be negative, got -1.0"),
            ({"min_count": -1}, "`min_count` not to be negative, got -1"),
            ({"posterior": "normal"}, "`posterior` to be one of 'histogram', 'published', got 'normal'"),
            ({"weighting": "log"}, "`weighting` to be one of 'exp', 'complement', 'drop', got 'log'"),
            ({"cut_down": "local"}, "`cut_down` to be one of 'global', 'per_anchor', 'off', got 'local'"),
        ],
    )
    def test_wrong_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            FalseNegativeSampler(**arguments)


def related_pairs(num_subjects=500, num_copies=4, dim=64):
    """Pairs, and the subject of each. A subject comes several times, under ids of its own each time."""
    subject = torch.arange(num_subjects).repeat(num_copies)[torch.randperm(num_subjects * num_copies)]
    center = unit(num_subjects, dim, dtype=torch.float32)[subject]
    image, text = (normalize(center + 0.6 * unit(*center.shape, dtype=torch.float32), dim=1) for _ in range(2))
    ids = torch.arange(len(subject))
    return EmbeddingPairs(image, text, ids, ids), subject


class TestPosterior:
    def recognise(self, batch_size, posterior):
        """Return the recall of known duplicates, and the fraction of other candidates that is lost."""
        torch.manual_seed(0)
        pairs, subject = related_pairs()
        sampler = FalseNegativeSampler(posterior=posterior)
        valid = torch.ones(len(pairs), dtype=torch.bool)
        for rows in torch.arange(1024).split(batch_size):
            batch = pairs.map(lambda part, rows=rows: part[rows])
            memory = MemoryCandidates(
                pairs.image_embeddings, pairs.text_embeddings, pairs.image_id, valid, batch, sampler
            )
            sampler.observe(batch)
            for direction in memory.directions(batch):
                sampler.weights(direction.scores(), margin=None)
        sampler.observe(batch)
        scores = memory.directions(batch)[0].scores()
        same = (subject[batch.image_id][:, None] == subject) & scores.negative_mask
        is_likely = sampler.posterior(scores.similarity) > sampler.threshold
        return is_likely[same].double().mean().item(), is_likely[~same].double().mean().item()

    @pytest.mark.parametrize("batch_size", [32, 256, 1024])
    def test_recognises_duplicates_whatever_the_batch(self, batch_size):
        recall, lost = self.recognise(batch_size, "histogram")
        assert recall > 0.9
        assert lost < 0.002

    def test_the_published_one_recognises_none_in_large_batches(self):
        """It fits its negatives to the hardest of the batch, and those are duplicates where the batch is large."""
        assert self.recognise(32, "published")[0] > 0.9
        assert self.recognise(1024, "published")[0] < 0.01

    def make_seen(self):
        torch.manual_seed(3)
        pairs = make_pairs(16, dim=8)
        sampler = FalseNegativeSampler(min_count=2)
        memory = make_memory(pairs, 50, sampler=sampler, num_images=40)
        for _ in range(2):
            sampler.observe(pairs)
            directions = memory.directions(pairs)
            draws = [sampler.draw(direction, margin=0.2)[0].candidate_index for direction in directions]
        return sampler, directions, draws

    def test_draws_of_a_step_are_the_same_again(self):
        """What a draw counts is for the steps to come."""
        sampler, directions, draws = self.make_seen()
        for direction, expected in zip(directions, draws, strict=True):
            assert torch.equal(sampler.draw(direction, margin=0.2)[0].candidate_index, expected)

    def test_never_falls_and_waits_for_enough_positives(self):
        sampler, _, _ = self.make_seen()
        found = sampler.posterior(torch.linspace(-1, 1, 999))
        assert (found.diff() >= 0).all()
        assert found[-1] > 0
        sampler.min_count = int(sampler.histograms.num_positives()) + 1
        assert (sampler.posterior(torch.linspace(-1, 1, 999)) == 0).all()

    def test_state_holds_the_histograms_and_older_states_do_without(self):
        sampler, _, _ = self.make_seen()
        state = sampler.state_dict()
        other = FalseNegativeSampler()
        other.load_state_dict(state)
        assert torch.equal(other.histograms.new, sampler.histograms.new)
        assert torch.equal(other.histograms.posterior, sampler.histograms.posterior)
        assert sampler.histograms.new.sum() > 0
        older = {name: value for name, value in state.items() if not name.startswith("histograms.")}
        older["_extra_state"] = {"epoch": 5}
        other.load_state_dict(older)
        assert other.epoch == 5
        assert other.histograms.num_positives() == 0
        assert torch.equal(other.statistics.mean, sampler.statistics.mean)

    def test_histograms_outlive_an_epoch_and_end_with_the_run(self):
        sampler, _, _ = self.make_seen()
        sampler.start_step(1, 0)
        assert sampler.statistics.count[0] == 0
        assert sampler.histograms.num_positives() > 0
        sampler.start_step(-1, 0)
        assert sampler.histograms.num_positives() == 0

    def test_counts_nothing_where_it_is_not_asked_to(self):
        pairs = make_pairs(8)
        memory = make_memory(pairs, sampler=FalseNegativeSampler(posterior="published", min_count=0))
        TripletLoss()(pairs, memory=memory)
        assert all((buffer == 0).all() for buffer in memory.sampler.histograms.buffers())
