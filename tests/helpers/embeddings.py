"""Sets of unit-norm embeddings that are hard to search."""

import torch
from torch.nn.functional import normalize


def embeddings(kind, rows, dim=64):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, dim, generator=generator)
    if kind == "cone":  # what an untrained tower gives: all in one direction, nearly
        x = x + 30
    if kind == "clusters":  # near-duplicates by the hundred
        x = torch.randn(20, dim, generator=torch.Generator().manual_seed(1))[torch.arange(rows) % 20] + 0.003 * x
    return normalize(x, dim=1)
