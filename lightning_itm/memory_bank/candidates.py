"""Candidates from a memory bank, as they travel in the batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.functional.false_negatives import DrawnNegative
from lightning_itm.functional.similarity import DirectionScores, full_precision, negative_mask


class NegativeSampler(Protocol):
    """What chooses among the candidates of a memory bank. Diagnostics have one value an anchor."""

    def observe(self, candidates: EmbeddingPairs) -> None:
        """Learn from the pairs of all ranks, before the first draw of a step."""

    def draw(self, direction: "MemoryDirection", *, margin: float | None) -> tuple[DrawnNegative, dict[str, Tensor]]:
        """Draw one candidate for each anchor."""

    def weights(self, scores: DirectionScores, *, margin: float | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Weigh every candidate of each anchor."""


class MemoryDirection(NamedTuple):
    """The anchors of one direction, and all the candidates of the other modality that a memory bank has for them."""

    anchor: Tensor
    """`(anchors, dim)`, with gradient."""
    positive: Tensor
    """`(anchors, dim)`."""
    candidate: Tensor
    """`(candidates, dim)`, without gradient."""
    mined: Tensor | None
    """`(mined, dim)`, with gradient: further candidates, after the others."""
    anchor_id: Tensor
    """`(anchors,)`; the image each anchor belongs to."""
    candidate_id: Tensor
    """`(candidates + mined,)`; −1 for places that hold nothing."""
    draw_id: Tensor
    """`(anchors,)`; the text each pair has, which the draw is a function of."""
    number: int
    """0: image to text, 1: text to image."""

    def similarity(self) -> Tensor:
        """Compare the anchors with all candidates, `(anchors, candidates + mined)`, in float32 or more."""
        with torch.autocast(self.anchor.device.type, enabled=False):
            anchor = full_precision(self.anchor)
            similarity = anchor @ self.candidate.to(anchor.dtype).T
            if self.mined is None:
                return similarity
            return torch.cat([similarity, anchor @ full_precision(self.mined).T], dim=1)

    def positive_similarity(self) -> Tensor:
        """Compare the anchors with their positives, `(anchors,)`."""
        return (full_precision(self.anchor) * self.positive).sum(dim=1)

    def scores(self) -> DirectionScores:
        """Compare the anchors with their positives and all candidates."""
        mask = negative_mask(self.anchor_id, self.candidate_id)
        return DirectionScores(self.similarity(), self.positive_similarity(), mask)

    def take(self, index: Tensor) -> Tensor:
        """Return candidates by their place, `(anchors, dim)`, with gradient where they have any."""
        if self.mined is None:
            return self.candidate[index]
        place = index - len(self.candidate)
        known = self.candidate[index.clamp_max(len(self.candidate) - 1)]
        return torch.where((place >= 0)[:, None], self.mined[place.clamp_min(0)], known)


@dataclass
class MemoryCandidates:
    """Slowly moving embeddings that a batch is compared with, and who chooses among them.

    The loss calls ``sampler.observe`` with the pairs of all ranks, and then draws, or weighs, for each direction.

    Args:
        image_embeddings: `(candidates, dim)`, unit-norm, without gradient.
        text_embeddings: `(candidates, dim)`, likewise; row by row the match of ``image_embeddings``.
        image_id: int64 `(candidates,)`.
        valid: bool `(candidates,)`; False for places that hold nothing.
        positive: The momentum embeddings of this rank's own pairs, which take the place of the positives; ``None``: the
            positives are those of the batch, with gradient. Where a row is not finite, that of the batch stands in.
        sampler: Chooses, or weighs.
    """

    image_embeddings: Tensor
    text_embeddings: Tensor
    image_id: Tensor
    valid: Tensor
    positive: EmbeddingPairs | None
    sampler: NegativeSampler

    def __iter__(self) -> Iterator[Tensor]:
        """Hold nothing that Lightning could take for the size of a batch."""
        return iter(())

    def directions(
        self, pairs: EmbeddingPairs, mined: EmbeddingPairs | None = None
    ) -> tuple[MemoryDirection, MemoryDirection]:
        """Set images against texts, and texts against images.

        Args:
            pairs: The anchors.
            mined: Further candidates.
        """
        image, text = pairs.image_embeddings, pairs.text_embeddings
        if self.positive is not None:
            image, text = (
                _finite_or(self.positive.image_embeddings, image),
                _finite_or(self.positive.text_embeddings, text),
            )
        candidate_id = torch.where(self.valid, self.image_id, -1)
        if mined is not None:
            candidate_id = torch.cat([candidate_id, mined.image_id])
        ids = pairs.image_id, candidate_id, pairs.text_id
        return (
            MemoryDirection(
                pairs.image_embeddings,
                text,
                self.text_embeddings,
                None if mined is None else mined.text_embeddings,
                *ids,
                0,
            ),
            MemoryDirection(
                pairs.text_embeddings,
                image,
                self.image_embeddings,
                None if mined is None else mined.image_embeddings,
                *ids,
                1,
            ),
        )


def _finite_or(rows: Tensor, others: Tensor) -> Tensor:
    return torch.where(rows.isfinite().all(dim=1, keepdim=True), rows, others.detach())
