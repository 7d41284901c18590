r"""Adaptive weights of the online hinge, and the hinges of offline negatives (AOQ).

A pair :math:`(I_1, T_1)` comes with negatives mined over the whole training set: a hard text :math:`T_3` of :math:`I_1` and
the image :math:`I_4` it belongs to, a hard image :math:`I_3` of :math:`T_1` and a text :math:`T_4` of it.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class OfflineScores(NamedTuple):
    """What one direction of the quintuplet loss needs to know of the mined negatives."""

    anchored: Float[Tensor, " anchors"]
    """Cosine of each anchor and its own mined negative: (I1, T3), or (T1, I3)."""
    unanchored: Float[Tensor, " anchors"]
    """Cosine of two mined negatives: (I3, T3), or (I4, T4)."""
    mined: Bool[Tensor, " anchors"]
    """False where nothing was mined: no offline term, and the online cost as it is."""
    both_mined: Bool[Tensor, " anchors"]
    """False where one of the two mined negatives is missing: no unanchored term."""
    matched: Bool[Tensor, " anchors"]
    """True where the two mined negatives belong to one image: they are a true pair."""


def quintuplet_cost(
    online_cost: Float[Tensor, " anchors"],
    offline: OfflineScores,
    *,
    positive: Float[Tensor, " anchors"],
    online_negative: Float[Tensor, " anchors"],
    offline_margin: float = 0.0,
    alpha: float = 0.3,
    beta: float = 1.5,
    as_published: bool = False,
    mask_matched: bool = True,
) -> Float[Tensor, " anchors"]:
    r"""Weigh the online cost by how much harder the mined negative is, and punish the mined ones too.

    .. math:: w\,\ell_i + [m' + s_{13} - s^+]_+ + [m' + s_{33} - s^+]_+, \qquad
              w = \beta - \frac{s_{13} - s^-}{\alpha}

    where :math:`s_{13}` is the anchor's own mined negative and :math:`s_{33}` the pair of mined negatives.

    Args:
        online_cost: The cost of the in-batch negatives, such as :func:`~lightning_itm.functional.hardest_cost`.
        offline: The anchors and their mined negatives.
        positive: s⁺, the cosine of every anchor and its own positive.
        online_negative: s⁻, that of the negative the online cost is about: the hardest of the batch, or one drawn from a
            memory bank, which is not in the paper. −inf where there is none.
        offline_margin: m', in units of cosine similarity.
        alpha: How much harder the mined negative must be for the weight to fall by one, in units of cosine similarity.
        beta: The weight where both are equally hard.
        as_published: Let gradient flow through w, and let w fall below 0. Both reward a violation: they pull the anchor
            towards its mined negative. By default w has no gradient and is at least 0. Not in the paper.
        mask_matched: Skip the unanchored term where it is a true pair. Not in the paper.

    Returns:
        One cost per anchor.

    References:
        *Adaptive Offline Quintuplet Loss for Image-Text Matching*, ECCV 2020, arXiv 2003.03669.
    """
    # −inf would make the weight infinite, so without an online negative the weight is `beta`.
    comparable = offline.mined & online_negative.isfinite()
    weight = beta - torch.where(comparable, offline.anchored - online_negative, 0) / alpha
    if not as_published:
        weight = weight.detach().clamp_min(0)
    anchored = (offline_margin + offline.anchored - positive).clamp_min(0)
    unanchored = (offline_margin + offline.unanchored - positive).clamp_min(0)
    unanchored = unanchored.masked_fill(~offline.both_mined, 0)
    if mask_matched:
        unanchored = unanchored.masked_fill(offline.matched, 0)
    return torch.where(offline.mined, weight * online_cost + anchored + unanchored, online_cost)
