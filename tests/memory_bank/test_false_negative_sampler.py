from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import normalize

from lightning_itm import FalseNegativeSampler, InfoNCELoss, QuintupletLoss, SigmoidLoss, TripletLoss
from lightning_itm.embeddings import EmbeddingPairs, HardNegatives
from lightning_itm.functional.false_negatives import DrawnNegative, false_negative_posterior
from lightning_itm.losses import DirectionCost
from lightning_itm.memory_bank import Agreement, MemoryCandidates, SimilarityStatistics, similarity_statistics
from tests.helpers.golden import GOLDEN, golden_steps


def unit(*shape, dtype=torch.float64):
    return normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def make_pairs(num_pairs, dim=6, image_id=None, dtype=torch.float64, noise=0.3):
    image = unit(num_pairs, dim, dtype=dtype)
    text = normalize(image + noise * torch.randn_like(image), dim=-1)
    ids = torch.arange(num_pairs)
    return EmbeddingPairs(image, text, ids if image_id is None else torch.as_tensor(image_id), ids)


def make_memory(pairs, num_queued=9, *, sampler=None, num_images=12):
    """This batch's slow embeddings, then a queue, some places of it empty."""
    noisy = [
        normalize(x + 0.1 * torch.randn_like(x), dim=-1).detach()
        for x in (pairs.image_embeddings, pairs.text_embeddings)
    ]
    slow = EmbeddingPairs(*noisy, pairs.image_id, pairs.text_id)
    queue = make_pairs(
        num_queued,
        pairs.image_embeddings.shape[1],
        torch.randint(0, num_images, (num_queued,)),
        pairs.image_embeddings.dtype,
    )
    valid = torch.cat([torch.ones(len(pairs), dtype=torch.bool), torch.rand(num_queued) < 0.7])
    everything = slow + queue
    sampler = FalseNegativeSampler(min_count=0) if sampler is None else sampler
    return MemoryCandidates(
        everything.image_embeddings,
        everything.text_embeddings,
        everything.image_id,
        valid,
        slow,
        sampler,
    )


def observed(batches):
    """Every value that counts, by loops over nested lists."""
    positive, negative = [], []
    for pairs in batches:
        ids, similarity = pairs.image_id.tolist(), (pairs.image_embeddings @ pairs.text_embeddings.T).tolist()
        for i in range(len(ids)):
            others = [j for j in range(len(ids)) if ids[j] != ids[i]]
            if not others:
                continue
            hardest = max(similarity[i][j] for j in others), max(similarity[j][i] for j in others)
            if similarity[i][i] > max(hardest):
                positive.append(similarity[i][i])
                negative += hardest
    return torch.tensor(positive, dtype=torch.float64), torch.tensor(negative, dtype=torch.float64)


class TestStatistics:
    @given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8), seed=st.integers(0, 1000))
    def test_equal_two_passes_over_everything(self, sizes, seed):
        torch.manual_seed(seed)
        statistics = SimilarityStatistics()
        batches = [make_pairs(size, image_id=torch.randint(0, 20, (size,)), noise=0.6) for size in sizes]
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
        self.sampler = FalseNegativeSampler(min_count=2)
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
            ({"weighting": "log"}, "`weighting` to be one of 'exp', 'complement', 'drop', got 'log'"),
            ({"cut_down": "local"}, "`cut_down` to be one of 'global', 'per_anchor', 'off', got 'local'"),
        ],
    )
    def test_wrong_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            FalseNegativeSampler(**arguments)


def term(positive, columns, loss, kind):
    """The cost of one anchor: its positive, and pairs of similarity and weight."""
    scale = float(loss.logit_scale.detach().exp())
    positive = torch.tensor(scale * positive, dtype=torch.float64)
    similarity, weight = torch.tensor(columns, dtype=torch.float64).view(-1, 2).T
    if kind == "info_nce":
        logits = torch.cat([positive[None], scale * similarity + weight.log()])
        return float(logits.logsumexp(0) - positive)
    bias = loss.logit_bias.item()
    negative = nn.functional.softplus(scale * similarity + bias + weight.log()).sum()
    return float(nn.functional.softplus(-positive - bias) + negative)


def reference_contrastive(pairs, memory, loss, kind):
    """Loops over every anchor and candidate, with the sampler's weights."""
    total = 0.0
    for direction in memory.directions(pairs):
        scores = direction.scores()
        weights, _ = memory.sampler.weights(scores, margin=None)
        own = (pairs.text_embeddings if direction.number == 0 else pairs.image_embeddings).detach()
        anchor = direction.anchor.detach()
        for i in range(len(pairs)):
            of_batch = [
                (float(anchor[i] @ own[j]), 1.0) for j in range(len(pairs)) if pairs.image_id[j] != pairs.image_id[i]
            ]
            stored = [
                (scores.similarity[i, k].item(), weights[i, k].item())
                for k in range(weights.shape[1])
                if memory.valid[k] and memory.image_id[k] != pairs.image_id[i] and weights[i, k] > 0
            ]
            # Two terms: live beside live, stored beside stored.
            total += term(float(anchor[i] @ own[i]), of_batch, loss, kind)
            total += term(float(anchor[i] @ direction.positive[i]), stored, loss, kind)
    return total / (2 * len(pairs))


class TestLosses:
    @pytest.mark.parametrize("weighting", ["exp", "complement", "drop"])
    @pytest.mark.parametrize(
        ("make_loss", "kind"), [(lambda: InfoNCELoss(1.5), "info_nce"), (lambda: SigmoidLoss(1.5, -3.0), "sigmoid")]
    )
    def test_contrastive_losses_have_a_weighted_term_of_stored_pairs(self, make_loss, kind, weighting):
        pairs = make_pairs(7, image_id=[0, 0, 1, 2, 3, 4, 5])
        pairs.image_embeddings.requires_grad_()
        sampler = FalseNegativeSampler(min_count=0, weighting=weighting, prior=0.2)
        sampler.observe(make_pairs(20))
        sampler.observe = lambda candidates: None  # what was seen stays as it is
        memory = make_memory(pairs, 12, sampler=sampler)
        loss = make_loss().double()
        outputs = loss(pairs, memory=memory)
        outputs["loss"].backward()
        assert pairs.image_embeddings.grad.isfinite().all()
        assert outputs["loss"].item() == pytest.approx(reference_contrastive(pairs, memory, loss, kind), abs=1e-9)
        assert outputs["loss"] > loss(pairs)["loss"]
        assert outputs["false_negative_rate"] > 0

    def test_triplet_loss_punishes_what_was_drawn(self):
        pairs = make_pairs(8)
        pairs.image_embeddings.requires_grad_()
        memory = make_memory(pairs)
        outputs = TripletLoss(0.5, memory="instead")(pairs, memory=memory)
        costs = []
        for direction in memory.directions(pairs):
            drawn, _ = memory.sampler.draw(direction, margin=0.5)
            anchor, positive = direction.anchor.detach(), direction.positive.detach()
            for i, k in enumerate(drawn.candidate_index.tolist()):
                cost = 0.5 - anchor[i] @ positive[i] + anchor[i] @ direction.candidate[k]
                costs.append(max(0.0, cost.item()))
        assert outputs["loss"].item() == pytest.approx(sum(costs) / len(costs), abs=1e-12)
        (gradient,) = torch.autograd.grad(outputs["loss"], pairs.image_embeddings)
        assert gradient.abs().max() > 0
        added = TripletLoss(0.5)(pairs, memory=memory)["loss"]
        torch.testing.assert_close(added, outputs["loss"] + TripletLoss(0.5)(pairs)["loss"])

    @pytest.mark.parametrize("make_loss", [lambda: TripletLoss(0.9), lambda: InfoNCELoss().double()])
    def test_stored_pairs_have_gradient_through_the_anchor_alone(self, make_loss):
        """The texts get none from the images' direction: neither as positives nor as negatives."""
        pairs = make_pairs(8)
        pairs.image_embeddings.requires_grad_()
        pairs.text_embeddings.requires_grad_()
        memory = make_memory(pairs)
        i2t, _ = memory.directions(pairs)
        cost = make_loss().memory_cost(DirectionCost(torch.zeros(8), {}), i2t, memory).cost.sum()
        image, text = torch.autograd.grad(cost, (pairs.image_embeddings, pairs.text_embeddings), allow_unused=True)
        assert image.abs().max() > 0
        assert text is None

    @pytest.mark.parametrize("make_loss", [TripletLoss, QuintupletLoss, InfoNCELoss, SigmoidLoss])
    def test_a_bank_that_does_not_agree_is_observed_and_left_out(self, make_loss):
        pairs = make_pairs(8)
        memory = replace(make_memory(pairs), agreement=Agreement().double(), is_in_loss=torch.tensor(False))
        loss = make_loss().double()
        outputs = loss(pairs, memory=memory)
        assert outputs["loss"] == loss(pairs)["loss"]
        assert memory.agreement.num_steps == 1
        assert memory.sampler.was_asked
        assert loss(pairs, memory=replace(memory, is_in_loss=torch.tensor(True)))["loss"] > outputs["loss"]

    def test_a_slow_positive_that_is_not_finite_costs_no_model(self):
        pairs = make_pairs(8)
        pairs.image_embeddings.requires_grad_()
        memory = make_memory(pairs)
        memory.positive.text_embeddings[3] = torch.nan
        memory.valid[3] = False
        memory.text_embeddings[3] = 0
        for loss in (
            TripletLoss(0.9),
            TripletLoss(0.9, memory="instead"),
            InfoNCELoss().double(),
            SigmoidLoss().double(),
        ):
            value = loss(pairs, memory=memory)["loss"]
            (gradient,) = torch.autograd.grad(value, pairs.image_embeddings)
            assert value.isfinite()
            assert gradient.isfinite().all()

    def test_an_anchor_whose_candidates_all_share_its_image_costs_nothing(self):
        pairs = make_pairs(4, image_id=[3, 3, 3, 3])
        pairs.image_embeddings.requires_grad_()
        memory = replace(make_memory(pairs), image_id=torch.full((13,), 3))
        for loss in (TripletLoss(0.5), TripletLoss(0.5, "selective"), InfoNCELoss().double()):
            outputs = loss(pairs, memory=memory)
            assert outputs["loss"] == 0
            (gradient,) = torch.autograd.grad(outputs["loss"], pairs.image_embeddings, allow_unused=True)
            assert gradient is None or (gradient.isfinite().all() and (gradient == 0).all())

    @pytest.mark.parametrize("how", ["added", "instead"])
    def test_where_the_selective_rule_is_on_the_batch_is_averaged(self, how):
        pairs = make_pairs(8, noise=0.05)
        pairs.text_embeddings[1] = pairs.text_embeddings[
            0
        ]  # anchors 0 and 1: the hardest negative is the positive's double
        memory = make_memory(pairs)
        plain = TripletLoss(0.3, memory=how)(pairs, memory=memory)["loss"]
        loss = TripletLoss(0.3, "selective", memory=how)
        switched_off = loss(pairs, memory=memory, selective=torch.zeros(8, dtype=torch.bool))
        selective = loss(pairs, memory=memory)
        torch.testing.assert_close(switched_off["loss"], plain)
        assert selective["averaged_fraction"] == pytest.approx(1 / 16)  # image 0; image 1 is far from text 1
        assert switched_off["averaged_fraction"] == 0
        assert selective["loss"] != plain

    def test_the_mean_has_no_switch_with_memory_either(self):
        pairs = make_pairs(4)
        with pytest.raises(ValueError, match="has no selective rule to switch"):
            TripletLoss(negatives="mean")(pairs, memory=make_memory(pairs), selective=torch.ones(4, dtype=torch.bool))

    def make_hard(self, pairs):
        names = ("text", "image_of_text", "image", "text_of_image")
        vectors = {f"{name}_embeddings": unit(*pairs.image_embeddings.shape).requires_grad_() for name in names}
        return vectors, HardNegatives(**vectors, image_id_of_text=pairs.image_id + 50, image_id=pairs.image_id + 80)

    @pytest.mark.parametrize("make_loss", [lambda: TripletLoss(0.9), lambda: InfoNCELoss().double()])
    def test_mined_pairs_are_candidates_too_and_keep_their_gradient(self, make_loss):
        pairs = make_pairs(6)
        vectors, hard = self.make_hard(pairs)
        memory = make_memory(pairs, sampler=FalseNegativeSampler(min_count=0, cut_down="off"))
        total = sum(self.gradient_of_mined(make_loss(), pairs, memory, hard, vectors, step) for step in range(20))
        assert total > 0

    def gradient_of_mined(self, loss, pairs, memory, hard, vectors, step):
        memory.sampler.start_step(0, step)
        value = loss(pairs, memory=memory, hard=hard)["loss"]
        gradients = torch.autograd.grad(value, [*vectors.values()], allow_unused=True)
        return sum(gradient.abs().sum() for gradient in gradients if gradient is not None)

    def test_quintuplet_as_published_weighs_against_the_drawn_negative(self):
        pairs = make_pairs(6)
        pairs.image_embeddings.requires_grad_()
        _, hard = self.make_hard(pairs)
        memory = make_memory(pairs)
        loss = QuintupletLoss(TripletLoss(0.5, memory="instead"), offline_margin=0.1, as_published=True)
        value = loss(pairs, memory=memory, hard=hard)["loss"]
        expected = 0.0
        for direction, mined, other in zip(
            memory.directions(pairs),
            (
                (pairs.image_embeddings * hard.text_embeddings).sum(1),
                (pairs.text_embeddings * hard.image_embeddings).sum(1),
            ),
            (
                (hard.image_embeddings * hard.text_embeddings).sum(1),
                (hard.image_of_text_embeddings * hard.text_of_image_embeddings).sum(1),
            ),
            strict=True,
        ):
            drawn, _ = memory.sampler.draw(direction, margin=0.5)
            negative = (direction.anchor * direction.candidate[drawn.candidate_index]).sum(1)
            positive = (pairs.image_embeddings * pairs.text_embeddings).sum(1)
            weight = 1.5 - (mined - negative) / 0.3
            online = (0.5 - (direction.anchor * direction.positive).sum(1) + negative).clamp_min(0)
            offline = (0.1 + mined - positive).clamp_min(0) + (0.1 + other - positive).clamp_min(0)
            expected += (weight * online + offline).mean() / 2
        torch.testing.assert_close(value, expected)

    @pytest.mark.parametrize("make_loss", [TripletLoss, QuintupletLoss, InfoNCELoss, SigmoidLoss])
    def test_is_float32_under_autocast(self, make_loss):
        torch.manual_seed(1)
        pairs = make_pairs(32, dim=64, dtype=torch.float32)
        memory = make_memory(pairs, 64)
        loss = make_loss()
        memory.sampler.observe(pairs)
        memory.sampler.observe = lambda candidates: None
        expected = loss(pairs, memory=memory)["loss"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(pairs, memory=memory)["loss"]
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=0)
