"""Whether the embeddings in a memory bank still say what the live model says."""

import torch
from torch import Tensor, nn

from lightning_itm.distributed import gather
from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.functional.similarity import full_precision, negative_mask

SMOOTHING = 0.95  # an average over about the last twenty steps
MIN_STEPS = 20
BEGUN = 0.1
JOIN, LEAVE = (0.9, 0.8), (0.8, 0.6)


class Agreement(nn.Module):
    """Follow how well stored embeddings find matches, compared with those of the live model.

    In each step, three searches within the batch: live embeddings among live ones, live ones among stored ones, and stored
    ones among stored ones. Each counts how often a pair finds its match first. A model that has just begun to train changes so
    fast that its slow copy finds far fewer matches than the model itself. Such stored embeddings are bad negatives.

    :attr:`is_met` becomes True when, averaged over about twenty steps, the live model finds a tenth of the matches or more,
    its embeddings find 90 % as many among the stored ones, and the stored ones find 80 % as many among themselves. It becomes
    False again below 80 % and 60 %. All state is tensors on the device, and the same on every rank.

    Attributes:
        hits: `(3,)`, the averages of the three searches: live in live, live in stored, stored in stored.
        cosine: `()`, the mean cosine of the live and the stored embedding of the same input. Dropout and batch norm lower it,
            too, because the slow copy is in eval mode. So it is logged and decides nothing.
        is_met: bool `()`.
        was_lost: bool `()`, True once :attr:`is_met` fell back to False.
    """

    hits: Tensor
    cosine: Tensor
    weight: Tensor
    num_steps: Tensor
    is_met: Tensor
    was_lost: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("hits", torch.zeros(3))
        self.register_buffer("cosine", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(()))  # the average of ones, which the other averages are divided by
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("is_met", torch.tensor(False))
        self.register_buffer("was_lost", torch.tensor(False))

    @torch.no_grad()
    def update(self, live: EmbeddingPairs, stored: EmbeddingPairs) -> None:
        """Take in one step.

        Args:
            live: The pairs of this rank, `(pairs, dim)`, as the loss sees them.
            stored: The same pairs, embedded by the slow copy.
        """
        with torch.autocast(live.image_embeddings.device.type, enabled=False):
            images, texts = full_precision(live.image_embeddings), full_precision(live.text_embeddings)
            slow_images, slow_texts = full_precision(stored.image_embeddings), full_precision(stored.text_embeddings)
            is_other = negative_mask(live.image_id, live.image_id)
            hits = [
                _hits(images @ texts.T, is_other),
                (_hits(images @ slow_texts.T, is_other) + _hits(texts @ slow_images.T, is_other)) / 2,
                _hits(slow_images @ slow_texts.T, is_other),
            ]
            cosine = ((images * slow_images).sum(1).mean() + (texts * slow_texts).sum(1).mean()) / 2
        values = gather(torch.stack([*hits, cosine]).float()[None]).mean(dim=0)  # every rank decides alike
        is_finite = values.isfinite().all()
        for average, value in ((self.hits, values[:3]), (self.cosine, values[3]), (self.weight, 1.0)):
            new = average * SMOOTHING + value * (1 - SMOOTHING)
            average.copy_(torch.where(is_finite, new, average))
        self.num_steps += is_finite
        self._decide()

    def ratios(self) -> Tensor:
        """Return how many matches are found per match of live in live, `(2,)`: live in stored, and stored in stored."""
        return self.hits[1:] / self.hits[0].clamp_min(torch.finfo(self.hits.dtype).tiny)

    def mean_cosine(self) -> Tensor:
        """Return the average of :attr:`cosine`, without the bias of its start at 0."""
        return self.cosine / self.weight.clamp_min(torch.finfo(self.weight.dtype).tiny)

    def _decide(self) -> None:
        join, leave = (self.hits.new_tensor(bounds) for bounds in (JOIN, LEAVE))
        ratios, has_begun = self.ratios(), self.hits[0] >= BEGUN * self.weight
        joins = (self.num_steps >= MIN_STEPS) & has_begun & (ratios >= join).all()
        leaves = (ratios < leave).any() | ~has_begun
        is_met = torch.where(self.is_met, ~leaves, joins)
        self.was_lost |= self.is_met & ~is_met
        self.is_met.copy_(is_met)


def _hits(similarity: Tensor, is_other: Tensor) -> Tensor:
    """Return the share of rows and columns whose own match, on the diagonal, is more similar than all others."""
    positive, others = similarity.diagonal(), similarity.masked_fill(~is_other, -torch.inf)
    return ((positive > others.amax(dim=1)).float().mean() + (positive > others.amax(dim=0)).float().mean()) / 2
