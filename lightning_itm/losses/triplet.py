"""Hinges: the triplet loss with its rules for the negative, and the quintuplet loss around it."""

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_itm.checks import check_choice
from lightning_itm.data.memory import MemoryCandidates, MemoryDirection
from lightning_itm.embeddings import EmbeddingPairs, HardNegatives
from lightning_itm.functional.quintuplet import OfflineScores, quintuplet_cost
from lightning_itm.functional.similarity import DirectionScores, hardest_negative
from lightning_itm.functional.triplet import hardest_cost, mean_cost, selective_cost
from lightning_itm.losses.base import DirectionCost, PairLoss


class TripletLoss(PairLoss):
    r"""Hinge on the similarity of a positive and a negative: VSE++, SelHN, or the mean over negatives.

    .. math:: [m - s^+ + s^-]_+

    Args:
        margin: m, in units of cosine similarity.
        negatives: ``"hardest"`` (VSE++); ``"selective"`` (SelHN: the mean over negatives for anchors whose hardest negative
            is as similar as the positive, the hardest for the others); ``"mean"``.
        epsilon: How close the two similarities must be for SelHN to take the mean.
        reduction: See :class:`PairLoss`. The papers' code sums.

    Logs ``active_fraction``, the share of anchors that cost anything, and, where the selective rule is on,
    ``averaged_fraction``, the share of anchors that took the mean.

    Raises:
        ValueError: ``margin`` or ``epsilon`` is not positive, or ``negatives`` is none of the three.

    Example:
        >>> import torch
        >>> ids = torch.arange(2)
        >>> orthogonal = EmbeddingPairs(torch.eye(2), torch.eye(2), ids, ids)
        >>> TripletLoss(margin=1.2)(orthogonal)["loss"]
        tensor(0.2000)

    References:
        VSE++: Faghri et al., BMVC 2018. SelHN: arXiv 2303.00181 (2023), with ``epsilon=0.01``. Both published codes count
        every other pair of the batch as a negative; here pairs of the same image are none.
    """

    def __init__(
        self,
        margin: float = 0.2,
        negatives: Literal["hardest", "selective", "mean"] = "hardest",
        *,
        epsilon: float = 0.01,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        check_choice("negatives", negatives, ("hardest", "selective", "mean"))
        for name, value in (("margin", margin), ("epsilon", epsilon)):
            if not value > 0:
                raise ValueError(f"Expected `{name}` to be positive, got {value}.")
        self.margin, self.negatives, self.epsilon = margin, negatives, epsilon

    @property
    def has_selective_rule(self) -> bool:
        """Whether there is a rule to switch: not with the mean over all negatives."""
        return self.negatives != "mean"

    def direction_cost(self, scores: DirectionScores, selective: Tensor | None) -> DirectionCost:
        """Compute the hinge cost of each anchor; see :mod:`lightning_itm.functional.triplet`."""
        rule = {}
        if self._is_selective(selective):
            cost, averaged = selective_cost(scores, margin=self.margin, epsilon=self.epsilon, enabled=selective)
            rule = {"averaged_fraction": averaged}
        elif self.negatives == "mean":
            cost = mean_cost(scores, margin=self.margin)
        else:
            cost = hardest_cost(scores, margin=self.margin)
        return DirectionCost(cost, {"active_fraction": cost > 0, **rule}, hardest_negative(scores))

    def memory_cost(
        self, scores: DirectionScores, direction: MemoryDirection, memory: MemoryCandidates, selective: Tensor | None
    ) -> DirectionCost:
        """Compute the hinge cost of each anchor's draw from the memory bank.

        Where the selective rule is on, an anchor whose hardest negative *in the batch* is as similar as its positive takes the
        mean over the batch instead (ours).
        """
        drawn, rule = memory.sampler.draw(direction, margin=self.margin)
        negative = _cosine(direction.anchor, direction.take(drawn.candidate_index))
        negative = negative.masked_fill(~drawn.is_negative, -torch.inf)
        cost = (self.margin - direction.positive_similarity() + negative).clamp_min(0)
        if self._is_selective(selective):
            of_batch, averaged = selective_cost(scores, margin=self.margin, epsilon=self.epsilon, enabled=selective)
            cost = torch.where(averaged, of_batch, cost)
            negative = torch.where(averaged, hardest_negative(scores), negative)
            rule = {**rule, "averaged_fraction": averaged}
        return DirectionCost(cost, {"active_fraction": cost > 0, **rule}, negative)

    def _is_selective(self, selective: Tensor | None) -> bool:
        if not self.has_selective_rule and selective is not None:
            raise ValueError(
                "TripletLoss(negatives='mean') has no selective rule to switch. Use 'hardest' or 'selective'."
            )
        return self.negatives == "selective" or selective is not None

    def extra_repr(self) -> str:
        """Show the arguments in the model summary."""
        return (
            f"margin={self.margin}, negatives={self.negatives!r}, epsilon={self.epsilon}, reduction={self.reduction!r}"
        )


class QuintupletLoss(PairLoss):
    r"""Hinges on negatives mined over the whole training set, and a hinge on those of the batch with adaptive weights (AOQ).

    For a pair :math:`(I_1, T_1)` with the mined text :math:`T_3` of the image :math:`I_4` and the mined image :math:`I_3` with
    its text :math:`T_4`, image to text:

    .. math:: w\,[m + \max_j s_{1j} - s^+]_+ + [m' + s(I_1, T_3) - s^+]_+ + [m' + s(I_3, T_3) - s^+]_+

    and text to image the same with :math:`s(I_3, T_1)` and :math:`s(I_4, T_4)`. Without mined negatives (a batch without
    ``hard``, or a row with the id −1) it is the online loss alone.

    Args:
        online: The loss of the in-batch negatives, with its own margin and rule. Default: ``TripletLoss()``.
        offline_margin: m', in units of cosine similarity.
        alpha: How much harder the mined negative must be than the hardest of the batch for w to fall by one.
        beta: w where both are equally hard.
        detach_weights: Let no gradient flow through w (ours if True).
        clamp_weights: Keep w from falling below 0 (ours if True). It does where the mined negative is harder by more than
            alpha · beta = 0.45, and then rewards a violation.
        mask_matched: Skip pairs of mined negatives that are a true pair (ours).
        reduction: See :class:`PairLoss`. The paper's code sums; that of ``online`` is not used.

    Logs what ``online`` logs, and ``hard_margin``, the mean of s⁺ minus the similarity of the mined negative.

    Raises:
        ValueError: ``alpha`` is not positive or ``offline_margin`` negative.
        TypeError: ``online`` is no TripletLoss.

    References:
        *Adaptive Offline Quintuplet Loss for Image-Text Matching*, ECCV 2020, arXiv 2003.03669. Its negatives are mined once;
        here by a callback, by default before each epoch.
    """

    def __init__(
        self,
        online: TripletLoss | None = None,
        *,
        offline_margin: float = 0.0,
        alpha: float = 0.3,
        beta: float = 1.5,
        detach_weights: bool = False,
        clamp_weights: bool = False,
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
        self.online = TripletLoss() if online is None else online
        self.options: dict[str, Any] = {
            "offline_margin": offline_margin,
            "alpha": alpha,
            "beta": beta,
            "detach_weights": detach_weights,
            "clamp_weights": clamp_weights,
            "mask_matched": mask_matched,
        }

    @property
    def has_selective_rule(self) -> bool:
        """Whether the online loss has one."""
        return self.online.has_selective_rule

    def direction_cost(self, scores: DirectionScores, selective: Tensor | None) -> DirectionCost:
        """Compute the online cost; what there is without mined negatives."""
        return self.online.direction_cost(scores, selective)

    def memory_cost(
        self, scores: DirectionScores, direction: MemoryDirection, memory: MemoryCandidates, selective: Tensor | None
    ) -> DirectionCost:
        """Compute the online cost with a draw from the memory bank."""
        return self.online.memory_cost(scores, direction, memory, selective)

    def forward(
        self,
        pairs: EmbeddingPairs,
        candidates: EmbeddingPairs | None = None,
        *,
        memory: MemoryCandidates | None = None,
        hard: HardNegatives | None = None,
        selective: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch; see :meth:`PairLoss.forward`. Mined negatives are those of their own row alone."""
        if hard is None:
            return super().forward(pairs, candidates, memory=memory, selective=selective)
        candidates = pairs if candidates is None else candidates
        text_there, image_there = hard.text_image_id >= 0, hard.image_id >= 0
        pair = text_there & image_there, hard.image_id == hard.text_image_id
        offline = (
            OfflineScores(_cosine(pairs.image, hard.text), _cosine(hard.image, hard.text), text_there, *pair),
            OfflineScores(
                _cosine(hard.image, pairs.text), _cosine(hard.text_image, hard.image_text), image_there, *pair
            ),
        )
        positive = _cosine(pairs.image, pairs.text)
        i2t, t2i = (
            self._quintuplet_cost(online, of_direction, positive)
            for online, of_direction in zip(
                self.costs(pairs, candidates, memory, None, selective), offline, strict=True
            )
        )
        return self.reduce(i2t, t2i, num_anchors=len(candidates))

    def _quintuplet_cost(self, online: DirectionCost, offline: OfflineScores, positive: Tensor) -> DirectionCost:
        if online.negative is None:
            raise TypeError("Expected the online cost to name its negative. Return it from `direction_cost`.")
        cost = quintuplet_cost(online.cost, offline, positive=positive, online_negative=online.negative, **self.options)
        return DirectionCost(cost, {**online.diagnostics, "hard_margin": positive - offline.anchored})

    def extra_repr(self) -> str:
        """Show the arguments in the model summary."""
        return ", ".join(f"{name}={value}" for name, value in (*self.options.items(), ("reduction", self.reduction)))


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=-1)
