"""InfoNCE and the pairwise sigmoid, per anchor, with candidates of the anchor's own image masked."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from lightning_itm.functional.similarity import DirectionScores


def info_nce_cost(scores: DirectionScores, *, logit_scale: Float[Tensor, ""]) -> Float[Tensor, " anchors"]:
    r"""Ask each anchor to pick its positive out of its negatives.

    .. math:: -\log \frac{e^{\gamma s^+_i}}{e^{\gamma s^+_i} + \sum_{j \in N_i} w_{ij} e^{\gamma s_{ij}}}

    where w is 1, or the exponential of ``scores.log_weight`` if that is given. Such weights are not in the paper.

    Args:
        scores: The scores of one direction.
        logit_scale: γ multiplies the cosines, typically by 10 to 100. Pass the factor itself and not its logarithm.

    Returns:
        One cost per anchor. It is 0 for an anchor without any negative.

    Example:
        >>> import torch
        >>> from lightning_itm.functional import DirectionScores, info_nce_cost
        >>> orthogonal = DirectionScores(torch.eye(2), torch.ones(2), ~torch.eye(2).bool())
        >>> info_nce_cost(orthogonal, logit_scale=torch.tensor(1.0))
        tensor([0.3133, 0.3133])

    References:
        Radford et al., *Learning Transferable Visual Models From Natural Language Supervision*, 2021, fig. 3. There
        every other pair of the batch is a negative. Here ``negative_mask`` leaves out pairs of the same image.
    """
    positive = logit_scale * scores.positive
    negative = _negative_logits(scores, logit_scale).masked_fill(~scores.negative_mask, -torch.inf)
    # Not log(e^p + e^n) − p: below 1e-7 that is 0 in float32, without gradient.
    return softplus(negative.logsumexp(dim=1) - positive)


def sigmoid_cost(
    scores: DirectionScores, *, logit_scale: Float[Tensor, ""], logit_bias: Float[Tensor, ""]
) -> Float[Tensor, " anchors"]:
    r"""Ask of each pair by itself whether it matches (SigLIP).

    .. math:: -\log \sigma(\gamma s^+_i + b) - \sum_{j \in N_i} \log \sigma(-\gamma s_{ij} - b - \log w_{ij})

    where w is 1, or the exponential of ``scores.log_weight`` if that is given. Such weights are not in the paper.

    Args:
        scores: The scores of one direction.
        logit_scale: γ multiplies the cosines, typically by 10 to 100. Pass the factor itself and not its logarithm.
        logit_bias: b is added to every logit, typically −10, because most pairs do not match.

    Returns:
        One cost per anchor, summed over its candidates as in the paper.

    References:
        Zhai et al., *Sigmoid Loss for Language Image Pre-Training*, ICCV 2023, algorithm 1. Pairs of the same image
        count there as negatives. Here they are left out.
    """
    positive = softplus(-(logit_scale * scores.positive + logit_bias))
    negative = softplus(_negative_logits(scores, logit_scale) + logit_bias)
    return positive + negative.masked_fill(~scores.negative_mask, 0).sum(dim=1)


def _negative_logits(scores: DirectionScores, logit_scale: Tensor) -> Tensor:
    logits = logit_scale * scores.similarity
    return logits if scores.log_weight is None else logits + scores.log_weight
