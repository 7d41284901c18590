"""The quintuplet loss: hinges on mined negatives around the triplet loss."""

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_itm.embeddings import EmbeddingPairs, HardCaptions, HardNegatives
from lightning_itm.functional.quintuplet import OfflineScores, quintuplet_cost
from lightning_itm.functional.similarity import DirectionScores
from lightning_itm.losses.base import DirectionCost, PairLoss, row_similarity
from lightning_itm.losses.triplet import TripletLoss
from lightning_itm.memory_bank.candidates import MemoryCandidates, MemoryDirection


class QuintupletLoss(PairLoss):
    r"""Add negatives that were mined over the whole training set to the triplet loss (AOQ).

    In plain terms: a batch seldom holds the negatives that are truly hard for its pairs.
    :class:`~lightning_itm.OfflineHardNegativeMining` finds them in the whole set and puts them into the batch. For each pair
    this loss then adds three hinges:

    1. the triplet loss of the batch, with a weight w. The harder the mined negative is in comparison, the smaller w is.
    2. the anchor and its mined negative.
    3. the mined image and the mined text. They do not match either, and the positive must be more similar than they are.

    When to use it: with that callback, to get the most out of a model that already ranks well.

    For a pair :math:`(I_1, T_1)` with the mined text :math:`T_3` of the image :math:`I_4` and the mined image :math:`I_3` with
    its text :math:`T_4`, image to text:

    .. math:: w\,[m + \max_j s_{1j} - s^+]_+ + [m' + s(I_1, T_3) - s^+]_+ + [m' + s(I_3, T_3) - s^+]_+

    and text to image the same with :math:`s(I_3, T_1)` and :math:`s(I_4, T_4)`. Without mined negatives (a batch without
    ``hard``, or a row with the id −1) it is the online loss alone. Where the mined negatives are embeddings of the mining
    pass, the positive of hinge 2 is the match as *that pass* embedded it, and hinge 3, which has no gradient then, is left
    out. Not in the paper, which encodes them anew.

    Args:
        online: The loss of the negatives in the batch, with its own margin and rule. Its ``reduction`` is not used. Default:
            ``TripletLoss()``.
        offline_margin: m', the margin of the mined negatives, in units of cosine similarity. The default, 0, only asks that
            the positive is more similar than they are. Raise it to push mined negatives further away.
        alpha: How much harder the mined negative must be than the hardest of the batch for w to fall by one, in units of
            cosine similarity. The default, 0.3, is the paper's.
        beta: The weight w where both are equally hard. The default, 1.5, is the paper's.
        as_published: Whether to let gradient flow through w, and to let w fall below 0, which happens where the mined negative
            is harder by more than alpha · beta = 0.45. Both pull the anchor towards its mined negative. By default w has no
            gradient and is at least 0, which is not in the paper.
        mask_matched: Whether to skip hinge 3 where the mined image and the mined text are a true pair, or T3 and T4 are equal.
            Turn it off to reproduce the published code. Not in the paper.
        reduction: ``"mean"`` over the anchors and both directions, or ``"sum"``, which multiplies it by twice the number of
            pairs on all ranks. The paper's code sums.

    Logs what ``online`` logs, and ``hard_margin``, the mean of s⁺ minus the similarity of the mined negative.

    Raises:
        ValueError: if ``alpha`` is not positive, or if ``offline_margin`` is negative.
        TypeError: if ``online`` is not a :class:`TripletLoss`.

    References:
        *Adaptive Offline Quintuplet Loss for Image-Text Matching*, ECCV 2020, arXiv 2003.03669. Its negatives are mined once.
        Here a callback mines them, by default before each epoch.
    """

    def __init__(
        self,
        online: TripletLoss | None = None,
        *,
        offline_margin: float = 0.0,
        alpha: float = 0.3,
        beta: float = 1.5,
        as_published: bool = False,
        mask_matched: bool = True,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        if online is not None and not isinstance(online, TripletLoss):
            raise TypeError(f"Expected `online` to be a TripletLoss, got {type(online).__name__}.")
        if not alpha > 0:
            raise ValueError(f"Expected `alpha` to be positive, got {alpha}.")
        if offline_margin < 0:
            raise ValueError(f"Expected `offline_margin` not to be negative, got {offline_margin}.")
        # A module: the model summary shows it, and its own margin and rule hold for the batch.
        self.online = TripletLoss() if online is None else online
        # Kept under the names of the pure function's arguments, which they are passed to as they are.
        self.options: dict[str, Any] = {
            "offline_margin": offline_margin,
            "alpha": alpha,
            "beta": beta,
            "as_published": as_published,
            "mask_matched": mask_matched,
        }

    @property
    def has_selective_rule(self) -> bool:
        """Whether the online loss has a selective rule to switch."""
        return self.online.has_selective_rule

    @property
    def memory_replaces_batch(self) -> bool:
        """Whether the online loss lets a memory bank replace the negatives of the batch."""
        return self.online.memory_replaces_batch

    def direction_cost(self, scores: DirectionScores, selective: Tensor | None) -> DirectionCost:
        """Compute the online cost, which is all there is without mined negatives."""
        return self.online.direction_cost(scores, selective)

    def memory_cost(self, batch: DirectionCost, direction: MemoryDirection, memory: MemoryCandidates) -> DirectionCost:
        """Compute the online cost with a draw from the memory bank."""
        return self.online.memory_cost(batch, direction, memory)

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
        """Compute the loss of a batch as :meth:`PairLoss.forward` does, but with mined negatives for their own row only."""
        inputs: dict[str, Any] = {"memory": memory, "selective": selective, "hard_captions": hard_captions}
        if hard is None:  # before the first mining, and in a run without the callback
            return super().forward(pairs, candidates, **inputs)
        self.check_selective(selective)
        candidates = pairs if candidates is None else candidates
        # Mined negatives are not passed on: the online loss must not see them, or w would compare them with themselves.
        of_batch = self.costs(pairs, candidates, **inputs)
        i2t, t2i = (
            self._quintuplet_cost(online, offline, positive)
            for online, offline, positive in zip(
                of_batch, _offline_scores(pairs, hard), _positives(pairs, hard), strict=True
            )
        )
        return self.reduce(i2t, t2i, num_anchors=len(candidates))

    def _quintuplet_cost(self, online: DirectionCost, offline: OfflineScores, positive: Tensor) -> DirectionCost:
        if online.negative is None:
            raise TypeError("Expected the online cost to name its negative. Return it from `direction_cost`.")
        # Costs are (anchors,), here and in the online loss, so that rows without a mined negative can keep their own.
        cost = quintuplet_cost(online.cost, offline, positive=positive, online_negative=online.negative, **self.options)
        return DirectionCost(cost, {**online.diagnostics, "hard_margin": positive - offline.anchored})

    def extra_repr(self) -> str:
        """Show the arguments in the model summary."""
        return ", ".join(f"{name}={value}" for name, value in (*self.options.items(), ("reduction", self.reduction)))


def _positives(pairs: EmbeddingPairs, hard: HardNegatives) -> tuple[Tensor, Tensor]:
    """Return s⁺ of both directions, `(pairs,)` each: to the match of the encoder that the mined negatives come from."""
    match = pairs if hard.positive is None else hard.positive
    return (
        row_similarity(pairs.image_embeddings, match.text_embeddings),
        row_similarity(pairs.text_embeddings, match.image_embeddings),
    )


def _offline_scores(pairs: EmbeddingPairs, hard: HardNegatives) -> tuple[OfflineScores, OfflineScores]:
    """Compare the anchors with their mined negatives, and these with each other, in both directions."""
    # (pairs,) each. The id −1 stands for "none was mined", and such a row is left to the online loss. So is a mined pair of
    # the anchor's caption, which a table of an older checkpoint may have.
    text_there = (hard.image_id_of_text >= 0) & ~_is_equal(pairs.caption_id, hard.caption_id, pairs)
    image_there = (hard.image_id >= 0) & ~_is_equal(pairs.caption_id, hard.caption_id_of_image, pairs)
    # Two embeddings of the mining pass have no gradient: their term would pull on the positive alone.
    both_there = text_there & image_there if hard.positive is None else torch.zeros_like(text_there)
    is_match = hard.image_id == hard.image_id_of_text
    pair = both_there, is_match | _is_equal(hard.caption_id, hard.caption_id_of_image, pairs)
    return (
        OfflineScores(
            row_similarity(pairs.image_embeddings, hard.text_embeddings),
            row_similarity(hard.image_embeddings, hard.text_embeddings),
            text_there,
            *pair,
        ),
        OfflineScores(
            row_similarity(hard.image_embeddings, pairs.text_embeddings),
            row_similarity(hard.image_of_text_embeddings, hard.text_of_image_embeddings),
            image_there,
            *pair,
        ),
    )


def _is_equal(one: Tensor | None, other: Tensor | None, pairs: EmbeddingPairs) -> Tensor:
    """Tell row by row whether two captions are the same one, bool `(pairs,)`. Those that are not known are not."""
    if one is None or other is None:
        return torch.zeros_like(pairs.image_id, dtype=torch.bool)
    return (one == other) & (one >= 0)
