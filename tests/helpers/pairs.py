"""Pairs of random unit vectors."""

import torch
from torch import nn

from lightning_itm.embeddings import EmbeddingPairs


def make_pairs(num_pairs, dim=5, image_id=None, dtype=torch.float64):
    """Return a leaf of the shape `(2, pairs, dim)`, for gradients, and the pairs that are made of it."""
    vectors = nn.functional.normalize(torch.randn(2, num_pairs, dim, dtype=dtype), dim=-1).requires_grad_()
    ids = torch.arange(num_pairs)
    return vectors, EmbeddingPairs(*vectors, ids if image_id is None else torch.as_tensor(image_id), ids)
