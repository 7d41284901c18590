"""Ranks and recall at K, without a sort and without the whole similarity matrix."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_itm.functional.similarity import shares_caption


def retrieval_rank(
    query: Float[Tensor, "queries dim"],
    key: Float[Tensor, "keys dim"],
    *,
    query_id: Int[Tensor, " queries"],
    key_id: Int[Tensor, " keys"],
    query_captions: Int[Tensor, "queries captions_of_query"] | None = None,
    key_captions: Int[Tensor, "keys captions_of_key"] | None = None,
    chunk_elements: int = 1 << 22,
) -> Int[Tensor, " queries"]:
    """Count the wrong keys that score at least as high as each query's best right key.

    Two images and four texts, the texts of image 0 first. Image 0 finds a text of its own on top (rank 0, as its other text
    is no error), image 1 has one wrong text that ties with its best, and a tie counts against the model (rank 1)::

        similarity   0.9  0.2 | 0.5  0.1        rank 0
                     0.1  0.6 | 0.6  0.3        rank 1

    Scores are float64 where the device has it, because float32 products of equal rows can differ by their place in the
    matrix, and a collapsed model would win by rounding. A score that is not a number counts against the model.

    Args:
        query: Embeddings of the queries. Scale them to unit norm if cosine similarity is meant.
        key: Embeddings of what is searched, with the same norm.
        query_id: The image each query belongs to.
        key_id: The image each key belongs to. A key is right if it belongs to the query's image.
        query_captions: The numbers of the captions of each query, filled up with −1. Default: captions are not compared.
        key_captions: The numbers of the captions of each key. A key is right, too, if it shares a caption with the query.
        chunk_elements: How many scores may exist at once. Lower it where memory is short.

    Returns:
        Ranks from 0. A query without any right key has the number of keys as its rank.

    Example:
        >>> import torch
        >>> from lightning_itm.functional import retrieval_rank
        >>> eye, ids = torch.eye(3), torch.arange(3)
        >>> retrieval_rank(eye, eye, query_id=ids, key_id=ids)
        tensor([0, 0, 0])
    """
    dtype = torch.float32 if query.device.type == "mps" else torch.float64
    key, rows = key.to(dtype), max(1, chunk_elements // max(1, len(key)))
    ranks = []
    for part in torch.arange(len(query), device=query.device).split(rows):
        right = query_id[part, None] == key_id
        if query_captions is not None and key_captions is not None:
            right |= shares_caption(query_captions[part], key_captions)
        ranks.append(_rank_of_rows(query[part].to(dtype) @ key.T, right))
    return torch.cat(ranks)


def recall_at_k(rank: Int[Tensor, " queries"], k: int) -> Float[Tensor, ""]:
    """Compute the fraction of queries whose best right key is among the first ``k``, in percent.

    Example:
        >>> import torch
        >>> from lightning_itm.functional import recall_at_k
        >>> recall_at_k(torch.tensor([0, 0, 3, 12]), 5)
        tensor(75.)
    """
    return 100 * (rank < k).float().mean()


def _rank_of_rows(similarity: Tensor, right: Tensor) -> Tensor:
    # (queries, keys) -> (queries, 1), −inf where no key is right.
    best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    # Products of float32 values are exact in float64, their sums are not: equal rows can still differ by 1e-16.
    beaten = similarity < best - _ROUNDING
    return (~beaten & ~right).sum(dim=1)


_ROUNDING = 1e-12
