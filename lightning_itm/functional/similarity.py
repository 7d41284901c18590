"""The scores of one direction: similarity, positive, and which candidates are negatives."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_itm.functional.precision import products

SMALLEST_NORM = 1e-12
"""Below it, a row counts as a row of zeros."""


class DirectionScores(NamedTuple):
    """What a loss needs to know of one direction (image to text, or text to image)."""

    similarity: Float[Tensor, "anchors candidates"]
    """Cosine of every anchor and every candidate."""
    positive: Float[Tensor, " anchors"]
    """Cosine of every anchor and its own positive."""
    negative_mask: Bool[Tensor, "anchors candidates"]
    """True where the candidate belongs to an image, and to another one than the anchor, and has another caption."""
    log_weight: Float[Tensor, "anchors candidates"] | None = None
    """What the contrastive losses add to the logits of the candidates. ``None`` adds nothing."""
    is_certain: Bool[Tensor, "anchors candidates"] | None = None
    """True where a negative is known to be wrong, so that no guard against likely matches leaves it out."""
    is_stored: bool = False
    """Whether positives and candidates were embedded earlier. Such scores train the towers, and no scale or bias of a loss."""


def unit_norm(embeddings: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
    """Scale every row to length one, in float32 whatever the autocast dtype (float64 stays float64).

    Args:
        embeddings: One embedding per row, of any norm and any floating dtype.

    Returns:
        The same directions with an L2 norm of one. Zeros stay zeros.

    Example:
        >>> import torch
        >>> from lightning_itm.functional import unit_norm
        >>> unit_norm(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """
    embeddings = full_precision(embeddings)
    norm = embeddings.norm(dim=-1, keepdim=True)  # (*rows, 1)
    # A row of zeros is divided by one. Divided by a tiny number instead, its gradient would be of the size of 1e12.
    return embeddings / torch.where(norm > SMALLEST_NORM, norm, 1)


def direction_scores(
    anchor: Float[Tensor, "anchors dim"],
    positive: Float[Tensor, "anchors dim"],
    candidate: Float[Tensor, "candidates dim"],
    *,
    anchor_id: Int[Tensor, " anchors"],
    candidate_id: Int[Tensor, " candidates"],
    anchor_caption_id: Int[Tensor, " anchors"] | None = None,
    candidate_caption_id: Int[Tensor, " candidates"] | None = None,
) -> DirectionScores:
    r"""Compare every anchor with its positive and with all candidates of the other modality.

    .. math:: s_{ij} = a_i \cdot c_j, \qquad s^+_i = a_i \cdot p_i

    Args:
        anchor: Unit-norm embeddings of the queries.
        positive: Unit-norm embedding of each query's own match, row by row.
        candidate: Unit-norm embeddings of everything a query may be compared with, the positives among them or not.
        anchor_id: The image each anchor belongs to.
        candidate_id: The image each candidate belongs to. A candidate of the anchor's own image is no negative, nor is
            one with the id −1, which stands for nothing.
        anchor_caption_id: The number of the caption of each anchor's pair, −1 where it is not known. Default: captions are
            not compared.
        candidate_caption_id: The number of the caption of each candidate's pair. One of the anchor's caption is no negative.

    Returns:
        The scores, in float32 whatever autocast and the settings of the process say (float64 inputs stay float64).

    Example:
        >>> import torch
        >>> from lightning_itm.functional import direction_scores
        >>> eye, ids = torch.eye(2), torch.tensor([7, 8])
        >>> direction_scores(eye, eye, eye, anchor_id=ids, candidate_id=ids).negative_mask
        tensor([[False,  True],
                [ True, False]])
    """
    return DirectionScores(
        similarity=products(anchor, candidate),  # (anchors, candidates)
        positive=(full_precision(anchor) * full_precision(positive)).sum(dim=-1),  # (anchors,)
        negative_mask=negative_mask(anchor_id, candidate_id, anchor_caption_id, candidate_caption_id),
    )


def negative_mask(
    anchor_id: Int[Tensor, " anchors"],
    candidate_id: Int[Tensor, " candidates"],
    anchor_caption_id: Int[Tensor, " anchors"] | None = None,
    candidate_caption_id: Int[Tensor, " candidates"] | None = None,
) -> Bool[Tensor, "anchors candidates"]:
    """Tell which candidates belong to another image than the anchor and have another caption.

    The image −1 stands for no image. The caption −1 is not known, and equal to no other.

    Example:
        >>> import torch
        >>> from lightning_itm.functional import negative_mask
        >>> negative_mask(torch.tensor([7]), torch.tensor([7, 8, -1]))
        tensor([[False,  True, False]])
        >>> negative_mask(torch.tensor([7]), torch.tensor([8, 9]), torch.tensor([3]), torch.tensor([3, 4]))
        tensor([[False,  True]])
    """
    # (anchors, 1) against (1, candidates): every anchor with every candidate.
    mask = (anchor_id[:, None] != candidate_id[None, :]) & (candidate_id >= 0)
    if anchor_caption_id is None or candidate_caption_id is None:
        return mask
    is_other = anchor_caption_id[:, None] != candidate_caption_id[None, :]
    return mask & (is_other | (anchor_caption_id < 0)[:, None])


def shares_caption(
    anchor_captions: Int[Tensor, "anchors captions_of_anchor"], key_captions: Int[Tensor, "keys captions_of_key"]
) -> Bool[Tensor, "anchors keys"]:
    """Tell which keys have one of the captions of an anchor, where each has any number of captions. −1 stands for none.

    Example:
        >>> import torch
        >>> from lightning_itm.functional.similarity import shares_caption
        >>> shares_caption(torch.tensor([[4, 5], [6, -1]]), torch.tensor([[5], [6], [-1]]))
        tensor([[ True, False, False],
                [False,  True, False]])
    """
    shared = anchor_captions.new_zeros(len(anchor_captions), len(key_captions), dtype=torch.bool)
    for of_anchor in anchor_captions.T:
        for of_key in key_captions.T:
            shared |= (of_anchor[:, None] == of_key) & (of_anchor >= 0)[:, None]
    return shared


def hardest_negative(scores: DirectionScores) -> Float[Tensor, " anchors"]:
    """Find the highest similarity among each anchor's negatives.

    Args:
        scores: The scores of one direction.

    Returns:
        One similarity per anchor. It is −inf for an anchor without any negative.
    """
    return torch.where(scores.negative_mask, scores.similarity, -torch.inf).max(dim=1).values


def full_precision(x: Tensor) -> Tensor:
    """Convert to float32, but keep float64."""
    return x if x.dtype == torch.float64 else x.float()
