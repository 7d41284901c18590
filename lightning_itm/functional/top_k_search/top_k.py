"""The most similar negatives of every anchor over a whole set, in chunks."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from lightning_itm.functional.top_k_search.candidates import OwnKeys, TopK
from lightning_itm.functional.top_k_search.ways import search_all

__all__ = ["TopK", "score_ceiling", "top_k_negatives"]


def top_k_negatives(
    anchors: Float[Tensor, "anchors dim"],
    keys: Float[Tensor, "keys dim"],
    k: int,
    *,
    anchor_id: Int[Tensor, " anchors"] | None = None,
    key_id: Int[Tensor, " keys"] | None = None,
    anchor_captions: Int[Tensor, "anchors captions_of_anchor"] | None = None,
    key_captions: Int[Tensor, "keys captions_of_key"] | None = None,
    positive: Float[Tensor, " anchors"] | None = None,
    rank_min: int = 0,
    max_score: float | None = None,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    memory_budget: int | None = None,
    method: Literal["auto", "chunked", "grouped"] = "auto",
) -> TopK:
    """Find the ``k`` keys of other images that are most similar to each anchor.

    Where the hardware multiplies in bfloat16, such products choose candidates, some more than ``k``, which are then compared
    in float32. An anchor whose ``k``-th candidate is not clear of those left out, by the largest error seen, is searched
    again by a slower way, at last in float32. So it is with a guard, too: the candidates are then the keys just below its
    limit, and a few above it, which float32 drops.

    Args:
        anchors: Unit-norm embeddings of the queries.
        keys: Unit-norm embeddings of what is searched.
        k: How many negatives to return per anchor, typically 60 to 300.
        anchor_id: The image each anchor belongs to.
        key_id: The image each key belongs to. A key of the anchor's own image is no negative. Both ids, or neither.
        anchor_captions: The numbers of the captions of each anchor, filled up with −1. Default: captions are not compared.
        key_captions: The numbers of the captions of each key. A key that shares a caption with the anchor is no negative,
            whatever its image is. Both, beside both ids, or neither.
        positive: Similarity of each anchor and its positive, for the two margins.
        rank_min: Leave out so many of the hardest, of those that the other guards let pass.
        max_score: Leave out what is more similar than this.
        absolute_margin: Leave out what is more similar than ``positive - absolute_margin``.
        relative_margin: Leave out what is more similar than ``positive - relative_margin * abs(positive)``.
        memory_budget: Bytes that scores may take at once. ``None``: 256 MB on a CPU, where they should stay near the cache,
            and 1 GB elsewhere.
        method: How candidates are chosen. ``"chunked"``: from the scores of a chunk. ``"grouped"``: from the best of each
            group of keys (:func:`~lightning_itm.functional.top_k_search.group_maxima`), so that on CUDA most scores never
            leave a kernel. It multiplies in bfloat16 on every device. ``"auto"``: grouped on CUDA with Triton, else chunked.
            With a guard, always chunked.

    Returns:
        Scores and rows of the keys, the hardest first.

    Raises:
        ValueError: ``k`` is not positive, ``rank_min`` negative, one id or caption without the other, a margin without
            ``positive``, no such ``method``, or embeddings that are not finite.

    Example:
        >>> import torch
        >>> from lightning_itm.functional import top_k_negatives
        >>> keys, ids = torch.eye(3), torch.arange(3)
        >>> top_k_negatives(torch.tensor([[0.8, 0.6, 0.0]]), keys, 2, anchor_id=ids[:1], key_id=ids).index
        tensor([[1, 2]])

    References:
        The guards have the names of sentence-transformers' ``mine_hard_negatives``. See NV-Retriever, arXiv 2407.15831 (2024).
    """
    _check(anchors, keys, k, rank_min, anchor_id, key_id)
    if (anchor_captions is None) != (key_captions is None) or (key_captions is not None and key_id is None):
        raise ValueError(
            "Expected both `anchor_captions` and `key_captions`, beside both ids, or neither, got some of them."
        )
    if method not in ("auto", "chunked", "grouped"):
        raise ValueError(f"Expected `method` to be 'auto', 'chunked' or 'grouped', got {method!r}.")
    if len(anchors) == 0 or len(keys) == 0:
        shape = len(anchors), k
        return TopK(keys.new_full(shape, -torch.inf, dtype=torch.float32), keys.new_full(shape, -1, dtype=torch.int64))
    anchors, keys = anchors.float().contiguous(), keys.float().contiguous()
    ceiling = score_ceiling(positive, max_score, absolute_margin, relative_margin)
    ceiling = None if ceiling is None else ceiling.expand(len(anchors)).to(anchors.device)
    captions = anchor_captions, key_captions
    own = None if anchor_id is None or key_id is None else OwnKeys(anchor_id, key_id, *captions)
    found = search_all(anchors, keys, own, k + rank_min, ceiling, memory_budget, method)
    scores, index = (part[:, rank_min:] for part in found)
    index = index.masked_fill(scores == -torch.inf, -1)
    # (anchors, up to k) -> (anchors, k): there may be fewer keys than k.
    missing = (0, k - scores.shape[1])
    return TopK(pad(scores, missing, value=-torch.inf), pad(index, missing, value=-1))


def score_ceiling(
    positive: Float[Tensor, " anchors"] | None = None,
    max_score: float | None = None,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
) -> Float[Tensor, "*anchors"] | None:
    """Compute the highest score that the guards of :func:`top_k_negatives` let pass. It is ``None`` without a guard.

    Example:
        >>> import torch
        >>> from lightning_itm.functional.top_k_search.top_k import score_ceiling
        >>> score_ceiling(torch.tensor([0.8, 0.4]), max_score=0.7, relative_margin=0.05)
        tensor([0.7000, 0.3800])
    """
    if positive is None and not (absolute_margin is None and relative_margin is None):
        raise ValueError("Expected `positive`, the similarity of each anchor and its positive, for a margin; got None.")
    # Every guard is an upper limit, so the lowest of them decides.
    limits = []
    if max_score is not None:
        limits.append(torch.as_tensor(max_score, device=None if positive is None else positive.device))
    if positive is not None and absolute_margin is not None:
        limits.append(positive.float() - absolute_margin)
    if positive is not None and relative_margin is not None:
        positive = positive.float()
        # Not (1 - r) * s: for a negative s this lies above s.
        limits.append(positive - relative_margin * positive.abs())
    return torch.stack(torch.broadcast_tensors(*limits)).amin(dim=0) if limits else None


def _check(
    anchors: Tensor, keys: Tensor, k: int, rank_min: int, anchor_id: Tensor | None, key_id: Tensor | None
) -> None:
    if k < 1:
        raise ValueError(f"Expected `k` to be a positive integer, got {k}.")
    if rank_min < 0:
        raise ValueError(f"Expected `rank_min` not to be negative, got {rank_min}.")
    if (anchor_id is None) != (key_id is None):
        raise ValueError("Expected both `anchor_id` and `key_id`, or neither, got one of them.")
    for name, embeddings in (("anchors", anchors), ("keys", keys)):
        if not bool(embeddings.sum(dtype=torch.float32).isfinite()):  # the sum of unit-norm rows is finite if all are
            raise ValueError(f"Expected `{name}` to be finite, got NaN or infinity. Look at the model that made them.")
