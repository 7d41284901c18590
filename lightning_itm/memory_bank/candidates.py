"""Candidates from a memory bank, as they travel in the batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.functional.false_negatives import DrawnNegative
from lightning_itm.functional.similarity import DirectionScores, full_precision, negative_mask
from lightning_itm.memory_bank.agreement import Agreement


class NegativeSampler(Protocol):
    """What chooses among the candidates of a memory bank. Diagnostics have one value per anchor."""

    def observe(self, candidates: EmbeddingPairs) -> None:
        """Learn from the pairs of all ranks, before the first draw of a step."""

    def draw(self, direction: "MemoryDirection", *, margin: float | None) -> tuple[DrawnNegative, dict[str, Tensor]]:
        """Draw one candidate for each anchor."""

    def weights(self, scores: DirectionScores, *, margin: float | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Weigh every candidate of each anchor."""


class MemoryDirection(NamedTuple):
    """The anchors of one direction, and what a memory bank has for them: their stored positives, and stored candidates."""

    anchor: Tensor
    """`(anchors, dim)`, with gradient."""
    positive: Tensor
    """`(anchors, dim)`, the anchors' matches as the slow copy embeds them, without gradient."""
    candidate: Tensor
    """`(candidates, dim)`, embedded by the slow copy, without gradient."""
    anchor_id: Tensor
    """`(anchors,)`, the image that each anchor belongs to."""
    candidate_id: Tensor
    """`(candidates,)`, −1 for places that hold nothing."""
    draw_id: Tensor
    """`(anchors,)`, the text of each pair. The draw is a function of it."""
    number: int
    """0: image to text, 1: text to image."""

    def similarity(self) -> Tensor:
        """Compare the anchors with all candidates, `(anchors, candidates)`, in float32 or more."""
        with torch.autocast(self.anchor.device.type, enabled=False):
            anchor = full_precision(self.anchor)
            return anchor @ self.candidate.to(anchor.dtype).T

    def positive_similarity(self) -> Tensor:
        """Compare the anchors with their stored positives, `(anchors,)`. 0 where the stored one is not finite."""
        anchor = full_precision(self.anchor)
        return (anchor * self.positive.masked_fill(~self._has_positive()[:, None], 0)).sum(dim=1)

    def negative_mask(self, rows: slice = slice(None)) -> Tensor:
        """Tell which candidates are negatives of some anchors, `(rows, candidates)`: none for an anchor without a positive."""
        mask = negative_mask(self.anchor_id[rows], self.candidate_id)
        return mask & self._has_positive()[rows, None]

    def scores(self) -> DirectionScores:
        """Compare the anchors with their stored positives and all candidates."""
        return DirectionScores(self.similarity(), self.positive_similarity(), self.negative_mask())

    def _has_positive(self) -> Tensor:
        return self.positive.isfinite().all(dim=1)


@dataclass
class MemoryCandidates:
    """Slowly moving embeddings that a batch is compared with, and who chooses among them.

    A stored negative is compared only with a stored positive. Beside a live positive, a loss could tell positives from
    negatives by their age alone, and would ruin the model. So candidates always carry the positives of their own encoder.

    A loss calls :meth:`observe` once per step. Then it draws from, or weighs, the candidates of each of :meth:`directions`.

    Args:
        image_embeddings: `(candidates, dim)`, unit-norm, without gradient.
        text_embeddings: `(candidates, dim)`, unit-norm, without gradient. Row by row the match of ``image_embeddings``.
        image_id: int64 `(candidates,)`, the image that each row belongs to.
        valid: bool `(candidates,)`, False for places that hold nothing.
        positive: The pairs of this rank as the slow copy embeds them, row by row as in the batch.
        sampler: What draws from the candidates, or weighs them.
        agreement: Follows how well stored embeddings stand for live ones. ``None``: nothing does.
        is_in_loss: bool `()` on the device. False: the loss computes its memory term and leaves it out. ``None``: it is in.
    """

    image_embeddings: Tensor
    text_embeddings: Tensor
    image_id: Tensor
    valid: Tensor
    positive: EmbeddingPairs
    sampler: NegativeSampler
    agreement: Agreement | None = None
    is_in_loss: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        """Hold nothing that Lightning could take for the size of a batch."""
        return iter(())

    def observe(self, pairs: EmbeddingPairs, candidates: EmbeddingPairs) -> None:
        """Learn from the live embeddings of a step, before the first draw.

        Args:
            pairs: The pairs of this rank.
            candidates: The pairs of all ranks.
        """
        self.sampler.observe(candidates)
        if self.agreement is not None:
            self.agreement.update(pairs, self.positive)

    def if_in_loss(self, with_memory: Tensor, without: Tensor) -> Tensor:
        """Return the first where the memory bank takes part in the loss, else the second. The host waits for nothing."""
        return with_memory if self.is_in_loss is None else torch.where(self.is_in_loss, with_memory, without)

    def directions(self, pairs: EmbeddingPairs) -> tuple[MemoryDirection, MemoryDirection]:
        """Set the images of ``pairs`` against stored texts, and their texts against stored images."""
        candidate_id = torch.where(self.valid, self.image_id, -1)
        ids = pairs.image_id, candidate_id, pairs.text_id
        return (
            MemoryDirection(pairs.image_embeddings, self.positive.text_embeddings, self.text_embeddings, *ids, 0),
            MemoryDirection(pairs.text_embeddings, self.positive.image_embeddings, self.image_embeddings, *ids, 1),
        )
