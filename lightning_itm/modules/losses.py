"""Losses over pairs of embeddings: the base prepares the scores, a subclass is the formula."""

import math
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_itm.data.batch import EmbeddingPairs
from lightning_itm.functional.contrastive import info_nce_cost, sigmoid_cost
from lightning_itm.functional.similarity import DirectionScores, direction_scores, hardest_negative
from lightning_itm.functional.triplet import hardest_cost, mean_cost, selective_cost


class DirectionCost(NamedTuple):
    """The costs of one direction, and what is worth watching of them."""

    cost: Tensor
    """`(anchors,)`."""
    diagnostics: dict[str, Tensor]
    """`(anchors,)` each; the mean over anchors and directions is logged."""


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

    @abstractmethod
    def direction_cost(self, scores: DirectionScores, selective: Tensor | None) -> DirectionCost:
        """Compute the cost of each anchor of one direction.

        Args:
            scores: The anchors against the candidates.
            selective: bool `(anchors,)`, or None; see :meth:`forward`.
        """

    def forward(
        self, pairs: EmbeddingPairs, candidates: EmbeddingPairs | None = None, *, selective: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            pairs: The anchors, each with its positive.
            candidates: The pairs of all ranks, ``pairs`` among them (:meth:`EmbeddingPairs.gather`). ``None``: the pairs.
            selective: bool `(pairs,)`: where the selective rule applies, in place of what the constructor says.

        Returns:
            ``"loss"``, the scalar to minimise, and detached diagnostics.

        Raises:
            ValueError: ``selective`` is given to a loss that has no such rule.
        """
        candidates = pairs if candidates is None else candidates
        i2t = self.direction_cost(
            direction_scores(
                pairs.image, pairs.text, candidates.text, anchor_id=pairs.image_id, candidate_id=candidates.image_id
            ),
            selective,
        )
        t2i = self.direction_cost(
            direction_scores(
                pairs.text, pairs.image, candidates.image, anchor_id=pairs.image_id, candidate_id=candidates.image_id
            ),
            selective,
        )
        loss = (i2t.cost.mean() + t2i.cost.mean()) / 2
        if self.reduction == "sum":
            loss = loss * (2 * len(candidates))
        diagnostics = {
            name: torch.cat([values, t2i.diagnostics[name]]).detach().float().mean()
            for name, values in i2t.diagnostics.items()
        }
        return {"loss": loss, **diagnostics}


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

    def direction_cost(self, scores: DirectionScores, selective: Tensor | None) -> DirectionCost:
        """Compute the hinge cost of each anchor; see :mod:`lightning_itm.functional.triplet`."""
        if self.negatives == "mean":
            if selective is not None:
                raise ValueError(
                    "TripletLoss(negatives='mean') has no selective rule to switch. Use 'hardest' or 'selective'."
                )
            cost, rule = mean_cost(scores, margin=self.margin), {}
        elif self.negatives == "selective" or selective is not None:
            cost, averaged = selective_cost(scores, margin=self.margin, epsilon=self.epsilon, enabled=selective)
            rule = {"averaged_fraction": averaged}
        else:
            cost, rule = hardest_cost(scores, margin=self.margin), {}
        return DirectionCost(cost, {"active_fraction": cost > 0, **rule})

    def extra_repr(self) -> str:
        """Show the arguments in the model summary."""
        return (
            f"margin={self.margin}, negatives={self.negatives!r}, epsilon={self.epsilon}, reduction={self.reduction!r}"
        )


class ScaledLoss(PairLoss):
    """Base of the losses that own a learned ``logit_scale`` (a logarithm, kept in [0, ln 100], as open_clip keeps it).

    Args:
        init_logit_scale: The start, a logarithm. ``None``: ``default_logit_scale``, or what pretrained weights bring.
        reduction: See :class:`PairLoss`.

    Raises:
        ValueError: ``init_logit_scale`` is outside [0, ln 100].
    """

    default_logit_scale: float
    max_logit_scale = math.log(100)

    def __init__(self, init_logit_scale: float | None = None, *, reduction: Literal["mean", "sum"] = "mean") -> None:
        super().__init__(reduction=reduction)
        start = self.default_logit_scale if init_logit_scale is None else init_logit_scale
        if not 0 <= start <= self.max_logit_scale:
            raise ValueError(
                f"Expected `init_logit_scale` to be in [0, ln 100 = {self.max_logit_scale:.3f}], got {start}. "
                "It is the logarithm of the factor: -ln(temperature)."
            )
        self.takes_pretrained_scale = init_logit_scale is None
        self.logit_scale = nn.Parameter(torch.tensor(start))

    def scale(self) -> Tensor:
        """Return the factor itself, its logarithm brought back into [0, ln 100] if a step led out of it."""
        with torch.no_grad():
            self.logit_scale.clamp_(0, self.max_logit_scale)
        return self.logit_scale.exp()

    def forward(
        self, pairs: EmbeddingPairs, candidates: EmbeddingPairs | None = None, *, selective: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch; see :meth:`PairLoss.forward`. Adds ``logit_scale``, the factor, to what is logged."""
        if selective is not None:
            raise ValueError(
                f"{type(self).__name__} has no selective rule to switch. Use TripletLoss(negatives='hardest' or 'selective')."
            )
        return {**super().forward(pairs, candidates), "logit_scale": self.logit_scale.detach().exp()}


class InfoNCELoss(ScaledLoss):
    r"""Cross-entropy of each anchor's positive among its negatives, both ways (CLIP).

    .. math:: -\log \frac{e^{\gamma s^+}}{e^{\gamma s^+} + \sum_j e^{\gamma s_j}}

    Args:
        init_logit_scale: ln γ at the start. ``None``: ln(1/0.07), or what pretrained weights bring.
        reduction: See :class:`PairLoss`.

    References:
        Radford et al., *Learning Transferable Visual Models From Natural Language Supervision*, 2021. There, pairs of the
        same image are negatives of each other; here they are not.
    """

    default_logit_scale = math.log(1 / 0.07)

    def direction_cost(self, scores: DirectionScores, selective: Tensor | None) -> DirectionCost:
        """Compute the cross-entropy of each anchor; see :func:`lightning_itm.functional.info_nce_cost`."""
        hit = hardest_negative(scores) < scores.positive
        return DirectionCost(info_nce_cost(scores, logit_scale=self.scale()), {"batch_accuracy": hit})


class SigmoidLoss(ScaledLoss):
    r"""Binary cross-entropy of every pair by itself (SigLIP).

    .. math:: -\log \sigma(\gamma s^+ + b) - \sum_j \log \sigma(-\gamma s_j - b)

    Args:
        init_logit_scale: ln γ at the start. ``None``: ln 10, or what pretrained weights bring.
        init_logit_bias: b at the start. ``None``: −10, or what pretrained weights bring.
        reduction: See :class:`PairLoss`.

    References:
        Zhai et al., *Sigmoid Loss for Language Image Pre-Training*, ICCV 2023. There, pairs of the same image are negatives
        of each other; here they are left out.
    """

    default_logit_scale = math.log(10)

    def __init__(
        self,
        init_logit_scale: float | None = None,
        init_logit_bias: float | None = None,
        *,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__(init_logit_scale, reduction=reduction)
        self.takes_pretrained_scale = init_logit_scale is None and init_logit_bias is None
        self.logit_bias = nn.Parameter(torch.tensor(-10.0 if init_logit_bias is None else float(init_logit_bias)))

    def direction_cost(self, scores: DirectionScores, selective: Tensor | None) -> DirectionCost:
        """Compute the cost of each anchor; see :func:`lightning_itm.functional.sigmoid_cost`."""
        hit = hardest_negative(scores) < scores.positive
        cost = sigmoid_cost(scores, logit_scale=self.scale(), logit_bias=self.logit_bias)
        return DirectionCost(cost, {"batch_accuracy": hit})


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError that lists the choices if the value is none of them."""
    if value not in choices:
        raise ValueError(f"Expected `{name}` to be one of {', '.join(map(repr, choices))}, got {value!r}.")
