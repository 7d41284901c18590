"""The base of the losses over pairs of embeddings. It prepares the scores, and a subclass is the formula."""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_itm.checks import check_choice
from lightning_itm.embeddings import EmbeddingPairs, HardNegatives
from lightning_itm.functional.similarity import DirectionScores, direction_scores
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
    3. Candidates of other images are its *negatives*. A candidate of the anchor's own image is never one.
    4. The loss is the mean of the costs of all anchors, over both directions.

    Anchors are the pairs of this rank only. Scores are float32 whatever the autocast dtype.

    Args:
        reduction: ``"mean"`` over the anchors and both directions, or ``"sum"``, which is the mean times twice the number of
            pairs on all ranks. VSE++ and its successors publish the sum. Use it only with a learning rate that was published
            for it.

    Raises:
        ValueError: if ``reduction`` is neither of the two.
    """

    def __init__(self, *, reduction: Literal["mean", "sum"] = "mean") -> None:
        super().__init__()
        check_choice("reduction", reduction, ("mean", "sum"))
        self.reduction = reduction  # read at each step, so that it may be changed in the middle of a run

    @property
    def has_selective_rule(self) -> bool:
        """Whether the loss has a selective rule that ``selective`` in :meth:`forward` can switch."""
        return False

    @abstractmethod
    def direction_cost(self, scores: DirectionScores, selective: Tensor | None) -> DirectionCost:
        """Compute the cost of each anchor of one direction.

        Args:
            scores: The similarities of the anchors to their positives and to all candidates. With a memory bank its candidates
                are among them, and ``scores.log_weight`` is to be added to their logits. A loss that ignores it treats likely
                false negatives like the others.
            selective: Where the selective rule applies, bool `(anchors,)`, or None, as in :meth:`forward`.
        """

    def memory_cost(
        self, scores: DirectionScores, direction: MemoryDirection, memory: MemoryCandidates, selective: Tensor | None
    ) -> DirectionCost:
        """Compute the cost of each anchor of one direction, where there is a memory bank.

        By default, its candidates are further negatives, weighted by its sampler (``scores.log_weight``).

        Args:
            scores: The similarities of the anchors to the pairs of the batch.
            direction: The anchors of this direction and the candidates of the memory bank.
            memory: The memory bank, whose ``sampler`` chooses or weights the candidates.
            selective: Where the selective rule applies, bool `(anchors,)`, or None, as in :meth:`forward`.
        """
        further = direction.scores()
        weights, diagnostics = memory.sampler.weights(further, margin=None)
        # The batch's candidates come first, then the bank's: (anchors, batch + bank). Those of the batch have the weight 1.
        everything = DirectionScores(
            torch.cat([scores.similarity, further.similarity], dim=1),
            scores.positive,
            torch.cat([scores.negative_mask, further.negative_mask & (weights > 0)], dim=1),
            torch.cat([torch.zeros_like(scores.similarity), weights.log()], dim=1),
        )
        cost = self.direction_cost(everything, selective)
        return cost._replace(diagnostics={**cost.diagnostics, **diagnostics})

    def forward(
        self,
        pairs: EmbeddingPairs,
        candidates: EmbeddingPairs | None = None,
        *,
        memory: MemoryCandidates | None = None,
        hard: HardNegatives | None = None,
        selective: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            pairs: The embeddings of this rank's pairs. Each row is an anchor with its positive.
            candidates: The pairs of all ranks, ``pairs`` among them, as ``pairs.gather()`` returns them. Default: ``pairs``.
            memory: The candidates of a memory bank. :class:`TripletLoss` draws from them instead of from the batch. In the
                other losses they are further candidates. Not in the paper.
            hard: The negatives that were mined for ``pairs``. Those of all ranks become further candidates. Not in the paper.
            selective: Where the selective rule applies, bool `(pairs,)`. It overrides the constructor's choice of rule.

        Returns:
            A dict with ``"loss"``, the scalar to minimise, and detached values to log.

        Raises:
            ValueError: if ``selective`` is given to a loss that has no such rule.
        """
        candidates = pairs if candidates is None else candidates
        # Gathered, because candidates are those of all ranks: a run on more ranks must have the same loss.
        mined = None if hard is None else hard.as_pairs().gather()
        return self.reduce(*self.costs(pairs, candidates, memory, mined, selective), num_anchors=len(candidates))

    def costs(
        self,
        pairs: EmbeddingPairs,
        candidates: EmbeddingPairs,
        memory: MemoryCandidates | None,
        mined: EmbeddingPairs | None,
        selective: Tensor | None,
    ) -> tuple[DirectionCost, DirectionCost]:
        """Compute the costs of both directions. ``mined`` are further candidates, ruled by the memory's sampler if any."""
        # Here and nowhere else: every loss comes through here, and a switch that nothing reads must not pass in silence.
        if selective is not None and not self.has_selective_rule:
            raise ValueError(
                f"Expected `selective` to be None, got a tensor: this {type(self).__name__} has no selective rule to switch. "
                "Use TripletLoss(negatives='hardest') or 'selective'."
            )
        if memory is None:
            # Mined pairs are candidates without being anchors. Those with the id −1 are never negatives.
            extended = candidates if mined is None else candidates + mined
            i2t, t2i = (self.direction_cost(scores, selective) for scores in both_directions(pairs, extended))
            return i2t, t2i
        # Before the first draw, and with the pairs of all ranks, so that every rank draws with the same statistics.
        memory.sampler.observe(candidates)
        i2t, t2i = (
            self.memory_cost(scores, direction, memory, selective)
            for scores, direction in zip(
                both_directions(pairs, candidates), memory.directions(pairs, mined), strict=True
            )
        )
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


def both_directions(pairs: EmbeddingPairs, candidates: EmbeddingPairs) -> tuple[DirectionScores, DirectionScores]:
    """Compare images with texts, and texts with images: two matrices of scores, each `(pairs, candidates)`."""
    # Image ids in both directions: they also tell which texts belong together, namely those of one image.
    ids = {"anchor_id": pairs.image_id, "candidate_id": candidates.image_id}
    return (
        direction_scores(pairs.image_embeddings, pairs.text_embeddings, candidates.text_embeddings, **ids),
        direction_scores(pairs.text_embeddings, pairs.image_embeddings, candidates.image_embeddings, **ids),
    )


def row_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Compare two sets of unit-norm embeddings row by row, `(rows,)`."""
    return (a * b).sum(dim=-1)
