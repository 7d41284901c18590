"""Where selective hard negatives come from: at a cold start the hardest negative contracts, the mean expands."""

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from lightning_itm import EmbeddingPairs, TripletLoss


def train(negatives, seed):
    torch.manual_seed(seed)
    latent = torch.randn(2000, 16)
    views = [latent @ torch.randn(16, 64) / 4 + 0.6 * torch.randn(2000, 64) for _ in range(2)]
    towers = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)) for _ in range(2))
    common = normalize(torch.randn(64), dim=0)
    with torch.no_grad():
        for tower in towers:
            tower[-1].weight.mul_(0.01)

    def embed(rows):
        image, text = (normalize(tower(view[rows]) + common, dim=-1) for tower, view in zip(towers, views, strict=True))
        return EmbeddingPairs(image, text, rows, rows)

    loss, optimizer = TripletLoss(0.2, negatives), torch.optim.AdamW(towers.parameters(), lr=3e-4)
    for _ in range(60):
        outputs = loss(embed(torch.randperm(1500)[:128]))
        optimizer.zero_grad()
        outputs["loss"].backward()
        nn.utils.clip_grad_norm_(towers.parameters(), 2.0)
        optimizer.step()
    with torch.no_grad():
        held_out = embed(torch.arange(1500, 2000))
        spread = 1 - normalize(held_out.image.mean(0), dim=0) @ held_out.image.T
        return TripletLoss(0.2, "hardest")(held_out)["loss"].item(), spread.mean().item()


@pytest.mark.parametrize("seed", range(5))
def test_hardest_collapses_and_selective_escapes(seed):
    hardest, hardest_spread = train("hardest", seed)
    selective, selective_spread = train("selective", seed)
    assert hardest > 0.195
    assert hardest_spread < 0.02
    assert selective < 0.13
    assert selective_spread > 0.5
