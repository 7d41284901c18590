"""The candidates that a memory bank puts into the batch, and what the losses make of them."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch.utilities.data import extract_batch_size
from torch import nn

from lightning_itm import FalseNegativeSampler, InfoNCELoss, QuintupletLoss, SigmoidLoss, TripletLoss
from lightning_itm.embeddings import HardNegatives
from lightning_itm.losses import DirectionCost
from lightning_itm.memory_bank import Agreement
from tests.helpers.memory import make_memory, make_pairs, unit

NUM_PAIRS, NUM_QUEUED = 8, 9


class TestDirections:
    def setup_method(self):
        torch.manual_seed(0)
        self.pairs = make_pairs(NUM_PAIRS, image_id=[0, 0, 1, 2, 3, 4, 5, 6])
        self.memory = make_memory(self.pairs, NUM_QUEUED, num_images=7)

    def test_set_images_against_stored_texts_and_texts_against_stored_images(self):
        i2t, t2i = self.memory.directions(self.pairs)
        assert i2t.anchor is self.pairs.image_embeddings
        assert t2i.anchor is self.pairs.text_embeddings
        assert i2t.candidate is self.memory.text_embeddings
        assert t2i.candidate is self.memory.image_embeddings
        assert i2t.positive is self.memory.positive.text_embeddings
        assert t2i.positive is self.memory.positive.image_embeddings
        assert (i2t.number, t2i.number) == (0, 1)

    def test_scores_equal_loops(self):
        assert not self.memory.valid.all()
        for direction in self.memory.directions(self.pairs):
            scores = direction.scores()
            for i in range(NUM_PAIRS):
                assert scores.positive[i].item() == pytest.approx(float(direction.anchor[i] @ direction.positive[i]))
                for k in range(NUM_PAIRS + NUM_QUEUED):
                    expected = float(direction.anchor[i] @ direction.candidate[k])
                    assert scores.similarity[i, k].item() == pytest.approx(expected)
                    is_other = bool(self.memory.image_id[k] != self.pairs.image_id[i])
                    assert scores.negative_mask[i, k] == (is_other and bool(self.memory.valid[k]))

    def test_candidates_of_the_anchors_caption_are_no_negatives(self):
        """Captions of the batch 0 to 7, two of them equal, and some of these, or of none known, in the queue."""
        own = torch.tensor([0, 1, 2, 2, 4, 5, 6, -1])
        queued = torch.cat([own, torch.tensor([2, -1, 5, 0, 9, 2, -1, 6, 1])])
        without = [direction.negative_mask() for direction in self.memory.directions(self.pairs)]
        pairs, memory = replace(self.pairs, caption_id=own), replace(self.memory, caption_id=queued)
        is_equal = torch.tensor([[a == c and a >= 0 for c in queued.tolist()] for a in own.tolist()])
        for direction, mask in zip(memory.directions(pairs), without, strict=True):
            assert (mask & is_equal).any()
            assert torch.equal(direction.negative_mask(), mask & ~is_equal)
            assert torch.equal(direction.scores().negative_mask, mask & ~is_equal)
            assert torch.equal(direction.negative_mask(slice(2, 5)), (mask & ~is_equal)[2:5])

    def test_the_mask_of_some_rows_is_a_part_of_that_of_all(self):
        for direction in self.memory.directions(self.pairs):
            assert torch.equal(direction.negative_mask(slice(2, 5)), direction.negative_mask()[2:5])

    def test_an_anchor_without_a_positive_has_no_negatives(self):
        self.memory.positive.text_embeddings[3, 1] = torch.inf
        i2t, t2i = self.memory.directions(self.pairs)
        assert i2t.negative_mask().any(dim=1).tolist() == [row != 3 for row in range(NUM_PAIRS)]
        assert i2t.scores().positive[3] == 0
        assert t2i.negative_mask().any(dim=1).all()

    def test_similarities_are_float32_under_autocast(self):
        pairs = make_pairs(NUM_PAIRS, dtype=torch.float32)
        direction = make_memory(pairs).directions(pairs)[0]
        expected = direction.scores()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = direction.scores()
        assert torch.equal(scores.similarity, expected.similarity)
        assert torch.equal(scores.positive, expected.positive)

    def test_lightning_finds_the_size_of_the_batch(self, recwarn):
        """And not that of the queue, or several sizes, of which it would warn."""
        batch = {"memory": self.memory, "image": torch.zeros(NUM_PAIRS, 3), "memory again": self.memory}
        assert extract_batch_size(batch) == NUM_PAIRS
        assert len(recwarn) == 0


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
            if kind == "sigmoid":  # all of the bank weighs as much as a batch
                stored = [(score, weight * len(pairs) / len(stored)) for score, weight in stored]
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
        sampler = FalseNegativeSampler(posterior="published", min_count=0, weighting=weighting, prior=0.2)
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
        memory = make_memory(pairs, sampler=FalseNegativeSampler(posterior="published", min_count=0))
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

    @pytest.mark.parametrize(
        "make_loss", [lambda: TripletLoss(0.9), lambda: InfoNCELoss().double(), lambda: SigmoidLoss().double()]
    )
    def test_stored_pairs_have_gradient_through_the_anchor_alone(self, make_loss):
        """The texts get none from the images' direction: neither as positives nor as negatives. Nor do scale and bias."""
        pairs = make_pairs(8)
        pairs.image_embeddings.requires_grad_()
        pairs.text_embeddings.requires_grad_()
        memory = make_memory(pairs)
        i2t, _ = memory.directions(pairs)
        loss = make_loss()
        cost = loss.memory_cost(DirectionCost(torch.zeros(8), {}), i2t, memory).cost.sum()
        inputs = pairs.image_embeddings, pairs.text_embeddings, *loss.parameters()
        image, *others = torch.autograd.grad(cost, inputs, allow_unused=True)
        assert image.abs().max() > 0
        assert others == [None] * len(others)

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
