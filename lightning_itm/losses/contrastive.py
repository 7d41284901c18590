"""InfoNCE and the pairwise sigmoid, with the learned scale they own."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_itm.distributed import world_size
from lightning_itm.functional.contrastive import (
    drop_likely_matches,
    emphasize_hard,
    info_nce_cost,
    sigmoid_cost,
)
from lightning_itm.functional.similarity import DirectionScores, hardest_negative
from lightning_itm.losses.base import DirectionCost, PairLoss


class ScaledLoss(PairLoss):
    """Own a learned scale that multiplies all similarities, and weigh negatives by how hard they are. Base of two losses.

    ``logit_scale`` is the logarithm of the scale, the negative logarithm of the temperature. It is a parameter of the loss and
    is kept in [0, ln 100], as open_clip keeps it. Only the comparison within the batch trains it. It is a constant for what a
    memory bank or stored embeddings add. Not in the papers.

    Args:
        init_logit_scale: The logarithm to start from, such as 2.66 for a temperature of 0.07. Default: the scale of the
            pretrained model if there is one, else ``default_logit_scale`` of the class.
        hardness: How much more a similar negative weighs, as in :func:`~lightning_itm.functional.emphasize_hard`.
        relative_margin: Leave out negatives that probably match, as in
            :func:`~lightning_itm.functional.drop_likely_matches`.
        reduction: ``"mean"`` over the anchors and both directions, or ``"sum"``, which multiplies it by twice the number of
            pairs on all ranks. Use ``"sum"`` only with a learning rate that was published for it.

    Raises:
        ValueError: if ``init_logit_scale`` is outside [0, ln 100], ``hardness`` is negative, or ``relative_margin`` is not
            between 0 and 1.
    """

    default_logit_scale: float
    max_logit_scale = math.log(100)

    def __init__(
        self,
        init_logit_scale: float | None = None,
        *,
        hardness: float = 0.0,
        relative_margin: float | None = None,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        if not 0 <= hardness < math.inf:
            raise ValueError(f"Expected `hardness` to be at least 0, got {hardness}. Typical: 3 to 9.")
        if relative_margin is not None and not 0 <= relative_margin < 1:
            raise ValueError(
                f"Expected `relative_margin` to be in [0, 1), got {relative_margin}. It is a fraction. Typical: 0.05."
            )
        self.hardness, self.relative_margin = float(hardness), relative_margin
        start = self.default_logit_scale if init_logit_scale is None else init_logit_scale
        if not 0 <= start <= self.max_logit_scale:
            raise ValueError(
                f"Expected `init_logit_scale` to be in [0, ln 100 = {self.max_logit_scale:.3f}], got {start}. "
                "It is the logarithm of the factor: -ln(temperature)."
            )
        self.init_logit_scale = init_logit_scale
        self.takes_pretrained_scale = init_logit_scale is None  # a start that was asked for is not overwritten
        self.logit_scale = nn.Parameter(torch.tensor(start))

    def weigh(self, scores: DirectionScores) -> DirectionScores:
        """Leave out negatives that probably match, and let hard ones weigh more."""
        if self.relative_margin is not None:
            scores = drop_likely_matches(scores, relative_margin=self.relative_margin)
        return scores if self.hardness == 0 else emphasize_hard(scores, hardness=self.hardness)

    def scale(self) -> Tensor:
        """Return the factor itself, after its logarithm is brought back into [0, ln 100] if a step led out of it."""
        # In place on the parameter: a clamp in the graph would have no gradient outside, and the scale could not return.
        with torch.no_grad():
            self.logit_scale.clamp_(0, self.max_logit_scale)
        return self.logit_scale.exp()

    def reduce(self, i2t: DirectionCost, t2i: DirectionCost, *, num_anchors: int) -> dict[str, Tensor]:
        """Average, or sum, the costs, and log the factor ``logit_scale``."""
        outputs = super().reduce(i2t, t2i, num_anchors=num_anchors)
        # Logged after the step's costs, which have brought the logarithm back into its range.
        return {**outputs, "logit_scale": self.logit_scale.detach().exp()}


class InfoNCELoss(ScaledLoss):
    r"""Classify each anchor's positive among all its negatives, in both directions (the loss of CLIP).

    In plain terms: each image is a question with all texts of the batch as answers, and each text one with all images. All
    negatives count, the most similar ones most.

    When to use it: for fine-tuning CLIP, as the default. It works best with large batches. If they do not fit into
    memory, set ``chunk_size`` of :class:`~lightning_itm.DualEncoder`.

    .. math:: -\log \frac{e^{\gamma s^+}}{e^{\gamma s^+} + \sum_j e^{\gamma s_j}}

    Args:
        init_logit_scale: ln γ at the start, learned from there. Default: the scale of the pretrained model if there is one,
            which is mostly near ln 100, else ln(1/0.07). Set it to begin with a softer or sharper comparison.
        hardness: Let a negative of cosine s weigh :math:`e^{\beta s}`, with this β. Typical: 3 to 9. Set it where items are
            alike (icons, products, faces) and a batch holds few hard negatives. At 0 all weigh the same. Not in the paper.
        relative_margin: Leave out negatives that are more similar than the positive less this fraction of its absolute value:
            they probably match. Typical: 0.05, where captions fit several images. Default: keep all. Not in the paper.
        reduction: ``"mean"`` over the anchors and both directions, or ``"sum"``, which multiplies it by twice the number of
            pairs on all ranks. Use ``"sum"`` only with a learning rate that was published for it.

    Logs ``batch_accuracy``, the fraction of anchors whose positive is more similar than every negative, and γ as
    ``logit_scale``.

    Raises:
        ValueError: if ``init_logit_scale`` is outside [0, ln 100], ``hardness`` is negative, or ``relative_margin`` is not
            between 0 and 1.

    Example:
        >>> import torch
        >>> from lightning_itm import InfoNCELoss
        >>> from lightning_itm.embeddings import EmbeddingPairs
        >>> pairs = EmbeddingPairs(torch.ones(2, 1), torch.ones(2, 1), torch.arange(2), torch.arange(2))
        >>> InfoNCELoss()(pairs)["loss"]  # two answers that are alike: ln 2
        tensor(0.6931, grad_fn=<DivBackward0>)

    References:
        Radford et al., *Learning Transferable Visual Models From Natural Language Supervision*, 2021. There, pairs of the
        same image are negatives of each other; here they are not. ``hardness``: LLaVE, arXiv 2503.04812 (2025).
    """

    default_logit_scale = math.log(1 / 0.07)

    def direction_cost(self, scores: DirectionScores, selective: Tensor | None) -> DirectionCost:
        """Compute the cross-entropy of each anchor with :func:`lightning_itm.functional.info_nce_cost`."""
        with torch.no_grad():  # to be logged
            hit = hardest_negative(scores) < scores.positive
        scale = _as_constant_if_stored(self.scale(), scores)
        return DirectionCost(info_nce_cost(self.weigh(scores), logit_scale=scale), {"batch_accuracy": hit})


class SigmoidLoss(ScaledLoss):
    r"""Classify every pair by itself as matching or not (the loss of SigLIP).

    In plain terms: for each image and each text of the batch, the question is "do these two match?". No pair competes with
    another one.

    When to use it: for fine-tuning SigLIP and other models that were trained with it, and for small batches.

    With a memory bank, all its candidates together weigh as much as one batch, because the bias is learned for so many.
    Hard batches are refused: scale and bias say how rare a match is in a random batch (``needs_random_batches``).

    .. math:: -\log \sigma(\gamma s^+ + b) - \sum_j \log \sigma(-\gamma s_j - b)

    Args:
        init_logit_scale: ln γ at the start, learned from there. Default: the scale of the pretrained model if there is one,
            else ln 10.
        init_logit_bias: b at the start, learned from there. It says how rare a match is. Default: the bias of the pretrained
            model if there is one, else −10, because nearly all pairs of a batch do not match.
        hardness: Let a negative of cosine s weigh :math:`e^{\beta s}`, with this β. Typical: 3 to 9. Set it where items are
            alike (icons, products, faces) and a batch holds few hard negatives. At 0 all weigh the same. Not in the paper.
        relative_margin: Leave out negatives that are more similar than the positive less this fraction of its absolute value:
            they probably match. Typical: 0.05, where captions fit several images. Default: keep all. Not in the paper.
        reduction: ``"mean"`` over the anchors and both directions, or ``"sum"``, which multiplies it by twice the number of
            pairs on all ranks. Use ``"sum"`` only with a learning rate that was published for it.

    Logs ``batch_accuracy``, the fraction of anchors whose positive is more similar than every negative, and γ as
    ``logit_scale``.

    Raises:
        ValueError: if ``init_logit_scale`` is outside [0, ln 100], ``hardness`` is negative, or ``relative_margin`` is not
            between 0 and 1.

    References:
        Zhai et al., *Sigmoid Loss for Language Image Pre-Training*, ICCV 2023. There, pairs of the same image are negatives
        of each other; here they are left out.
    """

    default_logit_scale = math.log(10)
    needs_random_batches = True

    def __init__(
        self,
        init_logit_scale: float | None = None,
        init_logit_bias: float | None = None,
        *,
        hardness: float = 0.0,
        relative_margin: float | None = None,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__(init_logit_scale, hardness=hardness, relative_margin=relative_margin, reduction=reduction)
        # Both or neither: a scale and a bias are learned together, and one of them alone would not fit the other.
        self.takes_pretrained_scale = init_logit_scale is None and init_logit_bias is None
        self.init_logit_bias = init_logit_bias
        self.logit_bias = nn.Parameter(torch.tensor(-10.0 if init_logit_bias is None else float(init_logit_bias)))

    def direction_cost(self, scores: DirectionScores, selective: Tensor | None) -> DirectionCost:
        """Compute the cost of each anchor with :func:`lightning_itm.functional.sigmoid_cost`."""
        with torch.no_grad():  # to be logged
            hit = hardest_negative(scores) < scores.positive
        scale, bias = (_as_constant_if_stored(value, scores) for value in (self.scale(), self.logit_bias))
        cost = sigmoid_cost(self.weigh(scores), logit_scale=scale, logit_bias=bias)
        return DirectionCost(cost, {"batch_accuracy": hit})

    def balance(self, stored: DirectionScores) -> DirectionScores:
        """Let all candidates of a memory bank together weigh as much as one batch.

        The cost sums over candidates, and the learned bias says how rare a match is among those of a batch. A queue of
        thousands would push all embeddings apart.
        """
        batch_size = len(stored.positive) * world_size()  # of all ranks, whose pairs are the candidates of a batch
        num_negatives = stored.negative_mask.sum(dim=1, keepdim=True).clamp_min(1)  # (anchors, 1)
        log_ratio = math.log(batch_size) - num_negatives.to(stored.similarity.dtype).log()
        log_weight = log_ratio if stored.log_weight is None else stored.log_weight + log_ratio
        return stored._replace(log_weight=log_weight.expand_as(stored.similarity))


def _as_constant_if_stored(value: Tensor, scores: DirectionScores) -> Tensor:
    # A bank has many more negatives than a batch. It would sharpen the scale until the towers fit the training set alone.
    return value.detach() if scores.is_stored else value
