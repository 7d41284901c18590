"""The base of the losses over pairs of embeddings. It prepares the scores, and a subclass is the formula."""

from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_itm.checks import check_choice
from lightning_itm.embeddings import EmbeddingPairs, HardCaptions, HardNegatives
from lightning_itm.functional.similarity import DirectionScores, direction_scores, full_precision
from lightning_itm.memory_bank.candidates import MemoryCandidates, MemoryDirection


class DirectionCost(NamedTuple):
    """Hold the costs of one direction, and the values to log about them."""

    cost: Tensor
    """The cost of each anchor, `(anchors,)`."""
    diagnostics: dict[str, Tensor]
    """Values to log by name, each `(anchors,)`. What is logged is their mean over anchors and directions."""
    negative: Tensor | None = None
    """The similarity of the negative that is punished, `(anchors,)`, if there is one per anchor."""


class PairLoss(nn.Module, ABC):
    """Prepare what every loss over pairs needs. A new loss subclasses it and implements :meth:`direction_cost`.

    In plain terms:

    1. Each image is an anchor, and so is each text. Its *positive* is the other half of its pair.
    2. Its *candidates* are the texts (or images) of all ranks, and what a callback has put into the batch.
    3. Candidates of other images are its *negatives*. A candidate of the anchor's own image is never one, nor is one with the
       anchor's caption.
    4. The loss is the mean of the costs of all anchors, over both directions.

    An embedding that was stored earlier, in a memory bank or by the mining pass, is compared only with the *stored* embedding
    of the anchor's match, in a term of its own. Beside a live positive, the loss could tell positives from negatives by age.

    Anchors are the pairs of this rank only. Scores are float32 whatever the autocast dtype.

    Args:
        reduction: ``"mean"`` over the anchors and both directions, or ``"sum"``, which is the mean times twice the number of
            pairs on all ranks. VSE++ and its successors publish the sum. Use it only with a learning rate that was published
            for it.

    Raises:
        ValueError: if ``reduction`` is neither of the two.
    """

    needs_random_batches: bool = False
    """Whether batches must be drawn at random, so that hard batches are refused."""

    def __init__(self, *, reduction: Literal["mean", "sum"] = "mean") -> None:
        super().__init__()
        check_choice("reduction", reduction, ("mean", "sum"))
        self.reduction = reduction  # read at each step, so that it may be changed in the middle of a run

    @property
    def has_selective_rule(self) -> bool:
        """Whether the loss has a selective rule that ``selective`` in :meth:`forward` can switch."""
        return False

    @property
    def memory_replaces_batch(self) -> bool:
        """Whether a memory bank replaces the negatives of the batch, hard captions among them."""
        return False

    @abstractmethod
    def direction_cost(self, scores: DirectionScores, selective: Tensor | None) -> DirectionCost:
        """Compute the cost of each anchor of one direction.

        Args:
            scores: The similarities of the anchors to their positives and to the candidates: those of the batch, of a memory
                bank, or mined ones. Where ``scores.log_weight`` is given, it is to be added to the logits of the candidates. A
                loss that ignores it treats likely false negatives like the others. Where ``scores.is_stored`` is True, what
                the loss itself has learned, such as a temperature, should be held constant.
            selective: Where the selective rule applies, bool `(anchors,)`, or None, as in :meth:`forward`.
        """

    def memory_cost(self, batch: DirectionCost, direction: MemoryDirection, memory: MemoryCandidates) -> DirectionCost:
        """Compute the cost of each anchor of one direction, where there is a memory bank.

        By default the cost of the batch plus :meth:`direction_cost` of the stored positive among the stored candidates, which
        the sampler weighs.

        Args:
            batch: The cost of the batch.
            direction: The anchors, their stored positives, and the candidates of the memory bank.
            memory: The memory bank.
        """
        scores = direction.scores()
        weights, diagnostics = memory.sampler.weights(scores, margin=None)
        scores = scores._replace(negative_mask=scores.negative_mask & (weights > 0), log_weight=weights.log())
        stored = self.direction_cost(self.balance(scores), None).cost
        return self.with_memory(batch, stored, memory, diagnostics)

    def balance(self, stored: DirectionScores) -> DirectionScores:
        """Weigh the candidates of a memory bank anew. Override it where a cost depends on how many there are.

        Args:
            stored: The anchors, their stored positives and the candidates, with ``log_weight``.
        """
        return stored

    def with_memory(
        self, batch: DirectionCost, stored: Tensor, memory: MemoryCandidates, diagnostics: dict[str, Tensor]
    ) -> DirectionCost:
        """Add what the memory bank costs each anchor, ``stored`` `(anchors,)`, where it takes part in the loss."""
        diagnostics = {**batch.diagnostics, **diagnostics, "memory_cost": stored}
        return batch._replace(cost=memory.if_in_loss(batch.cost + stored, batch.cost), diagnostics=diagnostics)

    def forward(
        self,
        pairs: EmbeddingPairs,
        candidates: EmbeddingPairs | None = None,
        *,
        memory: MemoryCandidates | None = None,
        hard: HardNegatives | None = None,
        selective: Tensor | None = None,
        hard_captions: HardCaptions | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            pairs: The embeddings of this rank's pairs. Each row is an anchor with its positive.
            candidates: The pairs of all ranks, ``pairs`` among them, as ``pairs.gather()`` returns them. Default: ``pairs``.
            memory: The candidates of a memory bank, with positives of their own. They add a term of their own. Not in the
                paper, where the bank replaces the batch (``TripletLoss(memory="instead")``).
            hard: The negatives that were mined for ``pairs``. Those of all ranks are compared with every anchor. Encoded in
                this step, they are further candidates of the batch. As embeddings of the mining pass, they add a term of their
                own. Not in the paper.
            selective: Where the selective rule applies, bool `(pairs,)`. It overrides the constructor's choice of rule.
            hard_captions: Captions without an image. They are further negatives of their own image, and of nothing else.

        Returns:
            A dict with ``"loss"``, the scalar to minimise, and detached values to log.

        Raises:
            ValueError: if ``selective`` is given to a loss that has no such rule.
        """
        self.check_selective(selective)
        candidates = pairs if candidates is None else candidates
        inputs: dict[str, Any] = {
            "memory": memory,
            "hard": hard,
            "selective": selective,
            "hard_captions": hard_captions,
        }
        costs = self.costs(pairs, candidates, **inputs)
        return self.reduce(*costs, num_anchors=len(candidates))

    def check_selective(self, selective: Tensor | None) -> None:
        """Raise a ValueError where a rule is switched that this loss does not have."""
        if selective is not None and not self.has_selective_rule:
            # A switch that nothing reads must not pass in silence.
            raise ValueError(
                f"Expected `selective` to be None, got a tensor: this {type(self).__name__} has no selective rule to switch. "
                "Use TripletLoss(negatives='hardest') or 'selective', or leave the GradientNormMonitor out."
            )

    def costs(
        self,
        pairs: EmbeddingPairs,
        candidates: EmbeddingPairs,
        *,
        memory: MemoryCandidates | None = None,
        hard: HardNegatives | None = None,
        selective: Tensor | None = None,
        hard_captions: HardCaptions | None = None,
    ) -> tuple[DirectionCost, DirectionCost]:
        """Compute the costs of both directions, images first. For the arguments, see :meth:`forward`."""
        # Gathered, because candidates are those of all ranks: a run on more ranks must have the same loss.
        mined = None if hard is None else hard.as_pairs().gather()
        is_stored = hard is not None and hard.positive is not None
        live = candidates if mined is None or is_stored else candidates + mined
        i2t_scores, t2i_scores = both_directions(pairs, pairs, live)
        if hard_captions is not None:
            if memory is not None and self.memory_replaces_batch:
                raise ValueError(
                    "Expected no hard captions beside a memory bank that replaces the batch, got both. Use "
                    "TripletLoss(memory='added'), or leave one of them out."
                )
            i2t_scores = with_hard_captions(i2t_scores, pairs.image_embeddings, hard_captions)
        costs = [self.direction_cost(scores, selective) for scores in (i2t_scores, t2i_scores)]
        if hard is not None and hard.positive is not None and mined is not None:
            for number, scores in enumerate(both_directions(pairs, hard.positive, mined)):
                stored = self.direction_cost(scores._replace(is_stored=True), None).cost
                costs[number] = costs[number]._replace(cost=costs[number].cost + stored)
        if memory is not None:
            memory.observe(pairs, candidates)
            for number, direction in enumerate(memory.directions(pairs)):
                costs[number] = self.memory_cost(costs[number], direction, memory)
        i2t, t2i = costs
        return i2t, t2i

    def reduce(self, i2t: DirectionCost, t2i: DirectionCost, *, num_anchors: int) -> dict[str, Tensor]:
        """Average, or sum, the costs of both directions.

        Args:
            i2t: The costs of the images of this rank, and what to log of them.
            t2i: The costs of its texts, with the same names to log.
            num_anchors: The number of pairs on all ranks, which ``reduction="sum"`` multiplies with.
        """
        # A mean over this rank alone: DDP averages gradients over ranks, which have equally many anchors.
        loss = (i2t.cost.mean() + t2i.cost.mean()) / 2
        if self.reduction == "sum":
            loss = loss * (2 * num_anchors)
        # Detached and on the device: a host read here would stop the queue of kernels at every step.
        diagnostics = {
            name: torch.cat([values, t2i.diagnostics[name]]).detach().float().mean()
            for name, values in i2t.diagnostics.items()
        }
        return {"loss": loss, **diagnostics}


def both_directions(
    anchors: EmbeddingPairs, positives: EmbeddingPairs, candidates: EmbeddingPairs
) -> tuple[DirectionScores, DirectionScores]:
    """Compare images with texts, and texts with images.

    Args:
        anchors: `(pairs, dim)` twice.
        positives: Row by row the matches of the anchors: the anchors themselves, or what an earlier pass made of them.
        candidates: All that the anchors are compared with.
    """
    ids: dict[str, Any] = {"anchor_id": anchors.image_id, "candidate_id": candidates.image_id}
    ids |= {"anchor_caption_id": anchors.caption_id, "candidate_caption_id": candidates.caption_id}
    i2t = direction_scores(anchors.image_embeddings, positives.text_embeddings, candidates.text_embeddings, **ids)
    if all(_holds_the_same(anchors, others) for others in (positives, candidates)):
        # One process: products and mask are the same. The mask is laid out as the products are, which is faster.
        mask = i2t.negative_mask.T.contiguous().T
        return i2t, i2t._replace(similarity=i2t.similarity.T, negative_mask=mask)
    return (
        i2t,
        direction_scores(anchors.text_embeddings, positives.image_embeddings, candidates.image_embeddings, **ids),
    )


def _holds_the_same(one: EmbeddingPairs, other: EmbeddingPairs) -> bool:
    return one.image_embeddings is other.image_embeddings and one.text_embeddings is other.text_embeddings


def with_hard_captions(scores: DirectionScores, images: Tensor, hard: HardCaptions) -> DirectionScores:
    """Add the hard captions of each image `(pairs, dim)` to its candidates, as negatives of this image alone."""
    images, captions = full_precision(images), full_precision(hard.text_embeddings)
    similarity = torch.cat([scores.similarity, (captions * images[:, None]).sum(dim=-1)], dim=1)
    is_certain = torch.cat([torch.zeros_like(scores.negative_mask), hard.mask], dim=1)
    mask = torch.cat([scores.negative_mask, hard.mask], dim=1)  # (pairs, candidates + captions)
    return scores._replace(similarity=similarity, negative_mask=mask, is_certain=is_certain)


def row_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Compare two sets of unit-norm embeddings row by row, `(rows,)`."""
    return (a * b).sum(dim=-1)
