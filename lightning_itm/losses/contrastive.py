"""InfoNCE and the pairwise sigmoid, with the learned scale they own."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_itm.embeddings import EmbeddingPairs, HardNegatives
from lightning_itm.functional.contrastive import info_nce_cost, sigmoid_cost
from lightning_itm.functional.similarity import DirectionScores, hardest_negative
from lightning_itm.losses.base import DirectionCost, PairLoss
from lightning_itm.memory_bank.candidates import MemoryCandidates


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
        self,
        pairs: EmbeddingPairs,
        candidates: EmbeddingPairs | None = None,
        *,
        memory: MemoryCandidates | None = None,
        hard: HardNegatives | None = None,
        selective: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch; see :meth:`PairLoss.forward`. Adds ``logit_scale``, the factor, to what is logged."""
        outputs = super().forward(pairs, candidates, memory=memory, hard=hard, selective=selective)
        return {**outputs, "logit_scale": self.logit_scale.detach().exp()}


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
