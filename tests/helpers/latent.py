"""A cold start at which the hardest negative collapses: two views of a latent, and towers with almost one point as output."""

import torch
from torch import nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from lightning_itm import DualEncoder, TripletLoss

MARGIN = 0.2


class TwoTowers(DualEncoder):
    """An MLP for each view. Where ``is_cold``, the last weights are small, and a common vector is added to every output."""

    def __init__(self, loss, is_cold=True):
        super().__init__(loss, warmup_steps=0)
        self.image_encoder, self.text_encoder = (
            nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)) for _ in range(2)
        )
        self.register_buffer("common", normalize(torch.randn(64), dim=0) * is_cold)
        if is_cold:
            with torch.no_grad():
                for tower in (self.image_encoder, self.text_encoder):
                    tower[-1].weight.mul_(0.01)

    def encode_image(self, image):
        return self.image_encoder(image) + self.common

    def encode_text(self, text):
        return self.text_encoder(text) + self.common

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


def make_run(seed, negatives, num_steps=60, *, is_cold=True):
    """Return a model, a loader with one batch a step, and the held-out batch: 1,500 and 500 pairs."""
    torch.manual_seed(seed)
    latent = torch.randn(2000, 16)
    views = [latent @ torch.randn(16, 64) / 4 + 0.6 * torch.randn(2000, 64) for _ in range(2)]
    model = TwoTowers(TripletLoss(MARGIN, negatives), is_cold)

    def batch(rows):
        return {"image": views[0][rows], "text": views[1][rows], "image_id": rows, "text_id": rows}

    batches = [batch(torch.randperm(1500)[:128]) for _ in range(num_steps)]
    return model, DataLoader(batches, batch_size=None), batch(torch.arange(1500, 2000))


@torch.no_grad()
def measure(model, held_out):
    """Return the hardest loss of held-out pairs, and how far their images spread around their mean."""
    pairs = model.embed(held_out)
    spread = 1 - normalize(pairs.image_embeddings.mean(0), dim=0) @ pairs.image_embeddings.T
    return TripletLoss(MARGIN, "hardest")(pairs)["loss"].item(), spread.mean().item()
