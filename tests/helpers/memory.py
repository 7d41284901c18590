"""Pairs of random unit vectors, and a memory bank for them."""

import torch
from torch.nn.functional import normalize

from lightning_itm import FalseNegativeSampler
from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.memory_bank import MemoryCandidates


def unit(*shape, dtype=torch.float64):
    return normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def make_pairs(num_pairs, dim=6, image_id=None, dtype=torch.float64, noise=0.3):
    image = unit(num_pairs, dim, dtype=dtype)
    text = normalize(image + noise * torch.randn_like(image), dim=-1)
    ids = torch.arange(num_pairs)
    return EmbeddingPairs(image, text, ids if image_id is None else torch.as_tensor(image_id), ids)


def make_memory(pairs, num_queued=9, *, sampler=None, num_images=12):
    """This batch's slow embeddings, then a queue, some places of it empty."""
    noisy = [
        normalize(x + 0.1 * torch.randn_like(x), dim=-1).detach()
        for x in (pairs.image_embeddings, pairs.text_embeddings)
    ]
    slow = EmbeddingPairs(*noisy, pairs.image_id, pairs.text_id)
    queue = make_pairs(
        num_queued,
        pairs.image_embeddings.shape[1],
        torch.randint(0, num_images, (num_queued,)),
        pairs.image_embeddings.dtype,
    )
    valid = torch.cat([torch.ones(len(pairs), dtype=torch.bool), torch.rand(num_queued) < 0.7])
    everything = slow + queue
    sampler = FalseNegativeSampler(min_count=0) if sampler is None else sampler
    return MemoryCandidates(
        everything.image_embeddings,
        everything.text_embeddings,
        everything.image_id,
        valid,
        slow,
        sampler,
    )
