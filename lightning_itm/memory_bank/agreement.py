"""Whether the embeddings in a memory bank still say what the live model says."""

import torch
from torch import Tensor, nn

from lightning_itm.distributed import gather
from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.functional.precision import products
from lightning_itm.functional.similarity import full_precision, negative_mask

SMOOTHING = 0.95  # an average over about the last twenty steps
MIN_STEPS = 20  # before that, the averages hang on the first few batches
BEGUN = 0.1  # a live model that finds fewer matches says nothing that could be agreed with
CHANCES = 2  # and at least twice as many as chance
JOIN = (0.9, 0.8)  # ratios of live in stored, and of stored in stored, from which on the bank is in the loss
LEAVE = (0.8, 0.6)  # lower than JOIN, so that noise does not switch the bank on and off


class Agreement(nn.Module):
    """Follow how well stored embeddings find matches, compared with those of the live model.

    A model that has just begun to train changes fast. Its slow copy then finds far fewer matches than the model itself, and
    what the copy embeds are bad negatives. So a memory bank takes part in the loss only while :attr:`is_met` is True.

    In plain terms:

    1. Each step searches the batch three times: live embeddings among live ones, live among stored ones, and stored among
       stored ones. Each search counts the pairs that find their own match first.
    2. The three counts are averaged over about twenty steps and over all ranks.
    3. :attr:`is_met` becomes True when the live model finds at least 10 % of the matches and twice as many as chance, live
       embeddings find at least 90 % as many among stored ones, and stored ones find at least 80 % as many among themselves.
    4. It becomes False again below 10 %, 80 % and 60 %.

    All state is in tensors on the device, so that no step waits for it. It is the same on every rank. Not in the paper.

    Attributes:
        hits: `(3,)`, the averages of the three searches, in the order above. They are too small at the start, like
            :attr:`weight`.
        cosine: `()`, the average cosine of the live and the stored embedding of one input. Dropout and batch norm lower it,
            too, because the slow copy is in eval mode. So it is logged and decides nothing.
        weight: `()`, the average of the number one. Divided by it, the other averages lose the bias of their start at 0.
        num_steps: int64 `()`, the steps that counted.
        is_met: bool `()`, True while stored embeddings agree with live ones.
        was_lost: bool `()`, True once :attr:`is_met` fell back to False.

    Example:
        >>> import torch
        >>> from lightning_itm.embeddings import EmbeddingPairs
        >>> from lightning_itm.memory_bank import Agreement
        >>> agreement = Agreement()
        >>> pairs = EmbeddingPairs(torch.eye(4), torch.eye(4), torch.arange(4), torch.arange(4))
        >>> for _ in range(20):
        ...     agreement.update(live=pairs, stored=pairs)
        >>> agreement.is_met
        tensor(True)
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
        self.register_buffer("weight", torch.zeros(()))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("is_met", torch.tensor(False))
        self.register_buffer("was_lost", torch.tensor(False))

    @torch.no_grad()
    def update(self, live: EmbeddingPairs, stored: EmbeddingPairs) -> None:
        """Take in one step. A step with a value that is not finite, on any rank, changes nothing.

        Args:
            live: The pairs of this rank, `(pairs, dim)` twice, as the loss sees them.
            stored: The slow copy's embeddings of these pairs, row by row as in ``live``.
        """
        images, texts = full_precision(live.image_embeddings), full_precision(live.text_embeddings)
        slow_images, slow_texts = full_precision(stored.image_embeddings), full_precision(stored.text_embeddings)
        ids = live.image_id, live.image_id, live.caption_id, live.caption_id
        is_other = negative_mask(*ids)  # (pairs, pairs)
        live_in_stored = _hits(products(images, slow_texts), is_other) + _hits(products(texts, slow_images), is_other)
        hits = [
            _hits(products(images, texts), is_other),
            live_in_stored / 2,
            _hits(products(slow_images, slow_texts), is_other),
        ]
        cosine = ((images * slow_images).sum(1).mean() + (texts * slow_texts).sum(1).mean()) / 2
        # (ranks, 4) -> (4,): every rank has the same mean, and so decides alike.
        values = gather(torch.stack([*hits, cosine]).float()[None]).mean(dim=0)
        # NaN is similar to nothing and gives finite hits. It is the cosine that tells.
        is_finite = values.isfinite().all()
        for average, value in ((self.hits, values[:3]), (self.cosine, values[3]), (self.weight, 1.0)):
            new = average * SMOOTHING + value * (1 - SMOOTHING)
            average.copy_(torch.where(is_finite, new, average))  # an `if` would make the host wait for the device
        self.num_steps += is_finite
        self._decide(len(live))

    def ratios(self) -> Tensor:
        """Return how many matches are found per match of live in live, `(2,)`: live in stored, and stored in stored."""
        return self.hits[1:] / self.hits[0].clamp_min(torch.finfo(self.hits.dtype).tiny)

    def mean_cosine(self) -> Tensor:
        """Return the average of :attr:`cosine`, without the bias of its start at 0."""
        return self.cosine / self.weight.clamp_min(torch.finfo(self.weight.dtype).tiny)

    def _decide(self, num_pairs: int) -> None:
        join, leave = (self.hits.new_tensor(bounds) for bounds in (JOIN, LEAVE))
        ratios, found = self.ratios(), self.hits[0] / self.weight.clamp_min(torch.finfo(self.weight.dtype).tiny)
        # Among few pairs chance alone finds many: 25 % in a batch of four.
        has_begun = found >= max(BEGUN, CHANCES / num_pairs)
        joins = (self.num_steps >= MIN_STEPS) & has_begun & (ratios >= join).all()
        leaves = (ratios < leave).any() | (found < BEGUN)
        # Two bounds: between them, what was decided last still holds.
        is_met = torch.where(self.is_met, ~leaves, joins)
        self.was_lost |= self.is_met & ~is_met
        self.is_met.copy_(is_met)


def _hits(similarity: Tensor, is_other: Tensor) -> Tensor:
    """Return the fraction of rows and columns whose own match, on the diagonal, is more similar than all others."""
    # Texts of the same image, or caption, are neither the match nor a rival: -inf, so that they never come first.
    positive, others = similarity.diagonal(), similarity.masked_fill(~is_other, -torch.inf)
    return ((positive > others.amax(dim=1)).float().mean() + (positive > others.amax(dim=0)).float().mean()) / 2
