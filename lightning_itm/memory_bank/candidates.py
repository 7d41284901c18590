"""Candidates from a memory bank, as they travel in the batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.functional.false_negatives import DrawnNegative
from lightning_itm.functional.precision import products
from lightning_itm.functional.similarity import DirectionScores, full_precision, negative_mask
from lightning_itm.memory_bank.agreement import Agreement


class NegativeSampler(Protocol):
    """What a loss asks to choose among the candidates of a memory bank.

    Implement these three methods for another rule. Each returns values to log beside its result, one value per anchor.
    """

    def observe(self, candidates: EmbeddingPairs) -> None:
        """Learn from a step, before its first draw.

        Args:
            candidates: The live embeddings of the pairs of all ranks, the same on each rank.
        """

    def draw(self, direction: "MemoryDirection", *, margin: float | None) -> tuple[DrawnNegative, dict[str, Tensor]]:
        """Draw one candidate for each anchor.

        Args:
            direction: The anchors with their stored positives and all candidates.
            margin: The margin of the loss, in cosine similarity, such as 0.2. Candidates that cost nothing at this margin may
                be left out. ``None``: leave none out.
        """

    def weights(self, scores: DirectionScores, *, margin: float | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Weigh every candidate of each anchor, `(anchors, candidates)`.

        Args:
            scores: The similarities of the anchors to their stored positives and to all candidates.
            margin: The margin of the loss, as in :meth:`draw`.
        """


class MemoryDirection(NamedTuple):
    """The anchors of one direction, with their stored positives and the stored candidates.

    A loss takes the similarities from here, :meth:`scores`, and never has to mask empty places or captions of one image.
    """

    anchor: Tensor
    """`(anchors, dim)`, with gradient."""
    positive: Tensor
    """`(anchors, dim)`, the anchors' matches as the slow copy embeds them, without gradient."""
    candidate: Tensor
    """`(candidates, dim)`, embedded by the slow copy, without gradient."""
    anchor_id: Tensor
    """`(anchors,)`, the image that each anchor belongs to."""
    candidate_id: Tensor
    """`(candidates,)`, the image that each candidate belongs to, −1 for places that hold nothing."""
    draw_id: Tensor
    """`(anchors,)`, the text of each pair. A draw depends on it, and not on the rank or row where the pair stands."""
    number: int
    """0: image to text, 1: text to image."""
    anchor_caption_id: Tensor | None = None
    """`(anchors,)`, the caption of each pair. ``None``: captions are not compared."""
    candidate_caption_id: Tensor | None = None
    """`(candidates,)`, the caption of each candidate, −1 where it is not known."""

    def similarity(self) -> Tensor:
        """Compare the anchors with all candidates, `(anchors, candidates)`, in float32 or more."""
        return products(self.anchor, self.candidate)

    def positive_similarity(self) -> Tensor:
        """Compare the anchors with their stored positives, `(anchors,)`. 0 where the stored one is not finite."""
        anchor = full_precision(self.anchor)
        # Masked before the product: the gradient of NaN times 0 would be NaN.
        return (anchor * self.positive.masked_fill(~self._has_positive()[:, None], 0)).sum(dim=1)

    def negative_mask(self, rows: slice = slice(None)) -> Tensor:
        """Tell which candidates are negatives of some anchors, `(rows, candidates)`.

        Candidates of the anchor's own image or caption and empty places are none. Where an anchor's positive is not finite, it
        has none.

        Args:
            rows: The anchors to look at. Default: all. Large banks are compared some rows at a time.
        """
        captions = None if self.anchor_caption_id is None else self.anchor_caption_id[rows]
        mask = negative_mask(self.anchor_id[rows], self.candidate_id, captions, self.candidate_caption_id)
        return mask & self._has_positive()[rows, None]

    def scores(self) -> DirectionScores:
        """Compare the anchors with their stored positives and all candidates."""
        parts = self.similarity(), self.positive_similarity(), self.negative_mask()
        return DirectionScores(*parts, is_stored=True)

    def _has_positive(self) -> Tensor:
        return self.positive.isfinite().all(dim=1)


@dataclass
class MemoryCandidates:
    """Carry the embeddings of a memory bank, and what chooses among them, to the loss as ``batch["memory"]``.

    A stored negative is compared only with a stored positive. Beside a live positive, a loss could tell positives from
    negatives by their age alone, and would ruin the model. So candidates always carry the positives of their own encoder.

    A loss calls :meth:`observe` once per step. Then it draws from, or weighs, the candidates of each of :meth:`directions`.
    The losses of this package do both when they are called with ``memory=batch["memory"]``.

    Args:
        image_embeddings: `(candidates, dim)`, unit-norm, without gradient.
        text_embeddings: `(candidates, dim)`, unit-norm, without gradient. Row by row the match of ``image_embeddings``.
        image_id: int64 `(candidates,)`, the image that each row belongs to.
        valid: bool `(candidates,)`, False for places of the queue that hold nothing yet.
        positive: The pairs of this rank as the slow copy embeds them, row by row as in the batch.
        sampler: What draws from the candidates, or weighs them. A :class:`~lightning_itm.FalseNegativeSampler`, usually.
        agreement: It follows how well stored embeddings stand for live ones. Default: nothing follows it.
        is_in_loss: bool `()` on the device. Where it is False, the loss computes its memory term to log it, and leaves it out
            of the sum. Default: the term is in the loss.
        caption_id: int64 `(candidates,)`, the caption of each row, −1 where not known. Default: captions are not compared.
    """

    image_embeddings: Tensor
    text_embeddings: Tensor
    image_id: Tensor
    valid: Tensor
    positive: EmbeddingPairs
    sampler: NegativeSampler
    agreement: Agreement | None = None
    is_in_loss: Tensor | None = None
    caption_id: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        """Yield nothing. Lightning looks for the batch size in what a batch holds, and must not find the queue's."""
        return iter(())

    def observe(self, pairs: EmbeddingPairs, candidates: EmbeddingPairs) -> None:
        """Learn from the live embeddings of a step, before the first draw.

        Args:
            pairs: The pairs of this rank, row by row as ``positive``.
            candidates: The pairs of all ranks, in the order of the ranks.
        """
        self.sampler.observe(candidates)
        if self.agreement is not None:
            self.agreement.update(pairs, self.positive)

    def if_in_loss(self, with_memory: Tensor, without: Tensor) -> Tensor:
        """Return the costs that hold now: with the memory bank where it takes part in the loss, else without.

        Args:
            with_memory: The costs with the term of the memory bank, `(anchors,)`.
            without: The costs of the batch alone, `(anchors,)`.
        """
        # `where` and not `if`, which would make the host wait for the device at each step.
        return with_memory if self.is_in_loss is None else torch.where(self.is_in_loss, with_memory, without)

    def directions(self, pairs: EmbeddingPairs) -> tuple[MemoryDirection, MemoryDirection]:
        """Set the images of ``pairs`` against stored texts, and their texts against stored images."""
        candidate_id = torch.where(self.valid, self.image_id, -1)  # (candidates,): -1 is no image, and never a negative
        ids = pairs.image_id, candidate_id, pairs.text_id
        captions = pairs.caption_id, self.caption_id
        images, texts = pairs.image_embeddings, pairs.text_embeddings
        return (
            MemoryDirection(images, self.positive.text_embeddings, self.text_embeddings, *ids, 0, *captions),
            MemoryDirection(texts, self.positive.image_embeddings, self.image_embeddings, *ids, 1, *captions),
        )
