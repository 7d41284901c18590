"""The base of the losses over pairs of embeddings: it prepares the scores, a subclass is the formula."""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_itm.checks import check_choice
from lightning_itm.embeddings import EmbeddingPairs, HardNegatives
from lightning_itm.functional.similarity import DirectionScores, direction_scores
from lightning_itm.memory_bank.candidates import MemoryCandidates, MemoryDirection


class DirectionCost(NamedTuple):
    """The costs of one direction, and what is worth watching of them."""

    cost: Tensor
    """`(anchors,)`."""
    diagnostics: dict[str, Tensor]
    """`(anchors,)` each; the mean over anchors and directions is logged."""
    negative: Tensor | None = None
    """`(anchors,)`; similarity of the negative that is punished, where it is one."""


class PairLoss(nn.Module, ABC):
    """Base of the losses. A subclass implements :meth:`direction_cost`.

    Anchors are the pairs of this rank, candidates those of all ranks. A candidate of the anchor's own image is never a
    negative. Scores are float32 whatever the autocast dtype.

    Args:
        reduction: ``"mean"`` over the anchors and the two directions, or ``"sum"``, which is the mean times twice the
            number of anchors of the global batch, as VSE++ and its successors publish it.

    Raises:
        ValueError: An unknown reduction.
    """

    def __init__(self, *, reduction: Literal["mean", "sum"] = "mean") -> None:
        super().__init__()
        check_choice("reduction", reduction, ("mean", "sum"))
        self.reduction = reduction

    @property
    def has_selective_rule(self) -> bool:
        """Whether ``selective`` in :meth:`forward` means anything."""
        return False

    @abstractmethod
    def direction_cost(self, scores: DirectionScores, selective: Tensor | None) -> DirectionCost:
        """Compute the cost of each anchor of one direction.

        Args:
            scores: The anchors against the candidates. With a memory bank its candidates are among them, and
                ``scores.log_weight`` is what to add to their logits: a loss that ignores it weighs likely false negatives like
                the others.
            selective: bool `(anchors,)`, or None; see :meth:`forward`.
        """

    def memory_cost(
        self, scores: DirectionScores, direction: MemoryDirection, memory: MemoryCandidates, selective: Tensor | None
    ) -> DirectionCost:
        """Compute the cost of each anchor of one direction, where there is a memory bank.

        By default, its candidates are further negatives, weighed by its sampler (``scores.log_weight``).

        Args:
            scores: The anchors against the pairs of the batch.
            direction: The anchors and the candidates of the memory bank.
            memory: The memory bank.
            selective: bool `(anchors,)`, or None; see :meth:`forward`.
        """
        further = direction.scores()
        weights, diagnostics = memory.sampler.weights(further, margin=None)
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
            pairs: The anchors, each with its positive.
            candidates: The pairs of all ranks, ``pairs`` among them (:meth:`EmbeddingPairs.gather`). ``None``: the pairs.
            memory: Candidates of a memory bank. :class:`TripletLoss` draws from them in place of the batch's; in the other
                losses they are further candidates (ours).
            hard: Negatives mined for ``pairs``. Those of all ranks become candidates too (ours).
            selective: bool `(pairs,)`: where the selective rule applies, in place of what the constructor says.

        Returns:
            ``"loss"``, the scalar to minimise, and detached diagnostics.

        Raises:
            ValueError: ``selective`` is given to a loss that has no such rule.
        """
        candidates = pairs if candidates is None else candidates
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
            extended = candidates if mined is None else candidates + mined
            i2t, t2i = (self.direction_cost(scores, selective) for scores in both_directions(pairs, extended))
            return i2t, t2i
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
            i2t: The costs of the images of this rank.
            t2i: The costs of its texts.
            num_anchors: The number of pairs on all ranks.
        """
        loss = (i2t.cost.mean() + t2i.cost.mean()) / 2
        if self.reduction == "sum":
            loss = loss * (2 * num_anchors)
        diagnostics = {
            name: torch.cat([values, t2i.diagnostics[name]]).detach().float().mean()
            for name, values in i2t.diagnostics.items()
        }
        return {"loss": loss, **diagnostics}


def both_directions(pairs: EmbeddingPairs, candidates: EmbeddingPairs) -> tuple[DirectionScores, DirectionScores]:
    """Compare images with texts, and texts with images."""
    ids = {"anchor_id": pairs.image_id, "candidate_id": candidates.image_id}
    return (
        direction_scores(pairs.image_embeddings, pairs.text_embeddings, candidates.text_embeddings, **ids),
        direction_scores(pairs.text_embeddings, pairs.image_embeddings, candidates.image_embeddings, **ids),
    )


def row_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Compare two sets of unit-norm embeddings row by row, `(rows,)`."""
    return (a * b).sum(dim=-1)
