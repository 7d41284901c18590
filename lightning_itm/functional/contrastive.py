"""InfoNCE and the pairwise sigmoid, per anchor, and how much each of their negatives counts."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from lightning_itm.functional.similarity import DirectionScores
from lightning_itm.functional.top_k_search.top_k import score_ceiling


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
    negative = torch.where(scores.negative_mask, _negative_logits(scores, logit_scale), -torch.inf)
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
    return positive + torch.where(scores.negative_mask, negative, 0).sum(dim=1)


def emphasize_hard(scores: DirectionScores, *, hardness: float) -> DirectionScores:
    r"""Let a negative weigh more, the more similar it is to the anchor.

    .. math:: \log w_{ij} \leftarrow \log w_{ij} + \beta \, \mathrm{sg}(s_{ij})

    where sg stops the gradient: a loss can't get smaller by making its own weights smaller.

    Args:
        scores: The scores of one direction.
        hardness: β, typically 3 to 9. A negative of cosine 0.5 weighs :math:`e^{\beta / 2}` times one of cosine 0. At 0,
            nothing changes.

    Returns:
        The same scores with ``log_weight``.

    Example:
        >>> import torch
        >>> from lightning_itm.functional import DirectionScores, emphasize_hard
        >>> scores = DirectionScores(torch.tensor([[0.5, -0.5]]), torch.ones(1), torch.ones(1, 2).bool())
        >>> emphasize_hard(scores, hardness=4.0).log_weight
        tensor([[ 2., -2.]])

    References:
        Lan et al., *LLaVE: Large Language and Vision Embedding Models with Hardness-Weighted Contrastive Learning*,
        arXiv 2503.04812 (2025). There, too, the hardness is the model's own cosine. The sigmoid loss has it only here.
    """
    log_weight = hardness * scores.similarity.detach()
    return scores._replace(log_weight=log_weight if scores.log_weight is None else scores.log_weight + log_weight)


def drop_likely_matches(scores: DirectionScores, *, relative_margin: float) -> DirectionScores:
    r"""Leave out negatives that are nearly as similar as the positive, or more: they probably match.

    A negative stays where :math:`s_{ij} \le s^+_i - r |s^+_i|`.

    Args:
        scores: The scores of one direction.
        relative_margin: r, typically 0.05. A larger one leaves more out.

    Returns:
        The same scores with fewer negatives.

    Example:
        >>> import torch
        >>> from lightning_itm.functional import DirectionScores, drop_likely_matches
        >>> scores = DirectionScores(torch.tensor([[0.5, 0.8]]), torch.tensor([0.8]), torch.ones(1, 2).bool())
        >>> drop_likely_matches(scores, relative_margin=0.05).negative_mask
        tensor([[ True, False]])

    References:
        Moreira et al., *NV-Retriever: Improving text embedding models with effective hard-negative mining*, arXiv 2407.15831
        (2024), which filters mined negatives by it. Here it filters those of the batch.
    """
    # There is one, because a margin was given.
    ceiling = cast("Tensor", score_ceiling(scores.positive.detach(), relative_margin=relative_margin))  # (anchors,)
    is_kept = scores.similarity <= ceiling[:, None]  # (anchors, candidates)
    if scores.is_certain is not None:
        is_kept = is_kept | scores.is_certain
    return scores._replace(negative_mask=scores.negative_mask & is_kept)


def _negative_logits(scores: DirectionScores, logit_scale: Tensor) -> Tensor:
    logits = logit_scale * scores.similarity
    return logits if scores.log_weight is None else logits + scores.log_weight
