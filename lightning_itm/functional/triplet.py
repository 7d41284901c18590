r"""Hinge costs of one direction: the mean over negatives, the hardest negative, selectively the hardest.

With anchor :math:`i`, its negatives :math:`N_i` and the margin :math:`m`, the cost of one negative is
:math:`[m - s^+_i + s_{ij}]_+`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_itm.functional.similarity import DirectionScores, hardest_negative


class SelectiveCost(NamedTuple):
    """The costs of selective hard negatives, and where the mean was taken."""

    cost: Float[Tensor, " anchors"]
    averaged: Bool[Tensor, " anchors"]


def hardest_cost(scores: DirectionScores, *, margin: float) -> Float[Tensor, " anchors"]:
    r"""Punish each anchor's most similar negative (VSE++).

    .. math:: \max_{j \in N_i} [m - s^+_i + s_{ij}]_+

    Args:
        scores: The scores of one direction.
        margin: How much less similar than the positive a negative has to be, in units of cosine similarity. Typically 0.2.

    Returns:
        One cost per anchor. It is 0 for an anchor without any negative.

    References:
        Faghri et al., *VSE++: Improving Visual-Semantic Embeddings with Hard Negatives*, BMVC 2018, eq. 6. The published
        code counts a second caption of the same image as a negative. Here ``negative_mask`` leaves it out.
    """
    return (margin - scores.positive + hardest_negative(scores)).clamp_min(0)


def mean_cost(scores: DirectionScores, *, margin: float) -> Float[Tensor, " anchors"]:
    r"""Punish all negatives of an anchor by the same weight.

    .. math:: \frac{1}{|N_i|} \sum_{j \in N_i} [m - s^+_i + s_{ij}]_+

    Args:
        scores: The scores of one direction.
        margin: How much less similar than the positive a negative has to be, in units of cosine similarity. Typically 0.2.

    Returns:
        One cost per anchor: the mean over all its negatives, also those that cost nothing. It is 0 for an anchor without any.
    """
    cost = (margin - scores.positive[:, None] + scores.similarity).clamp_min(0)  # (anchors, candidates)
    num_negatives = scores.negative_mask.sum(dim=1).clamp_min(1)
    return cost.masked_fill(~scores.negative_mask, 0).sum(dim=1) / num_negatives


def selective_cost(
    scores: DirectionScores,
    *,
    margin: float,
    epsilon: float,
    enabled: Bool[Tensor, " anchors"] | None = None,
) -> SelectiveCost:
    r"""Punish the hardest negative, or the mean where the hardest one is as similar as the positive (SelHN).

    With :math:`d_i = |s^+_i - \max_{j \in N_i} s_{ij}|`, not differentiated: the mean where :math:`d_i < \epsilon`,
    strictly, else the hardest. Where all embeddings collapse to one point the gradient of the hardest negative is of
    the order of their distance and contracts it further. That of the mean is no larger, but it expands.

    Args:
        scores: The scores of one direction.
        margin: How much less similar than the positive a negative has to be, in units of cosine similarity. Typically 0.2.
        epsilon: How close the two similarities must be for the mean to be taken, in units of cosine similarity.
            Typically 0.01.
        enabled: Where False, the hardest negative is taken whatever its similarity. ``None``: True everywhere.

    Returns:
        The cost of each anchor, and whether it is the mean.

    Example:
        >>> import torch
        >>> from lightning_itm.functional import DirectionScores, selective_cost
        >>> flat = torch.full((2, 2), 0.5)
        >>> selective_cost(DirectionScores(flat, flat[0], ~torch.eye(2).bool()), margin=0.2, epsilon=0.01).averaged
        tensor([True, True])

    References:
        *Selectively Hard Negative Mining for Alleviating Gradient Vanishing in Image-Text Matching*,
        arXiv 2303.00181 (2023).
    """
    hardest = hardest_negative(scores)
    # −inf where there is no negative: the distance is inf, so such an anchor is never averaged.
    averaged = (scores.positive - hardest).detach().abs() < epsilon
    if enabled is not None:
        averaged = averaged & enabled
    cost = (margin - scores.positive + hardest).clamp_min(0)
    return SelectiveCost(torch.where(averaged, mean_cost(scores, margin=margin), cost), averaged)
