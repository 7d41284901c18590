"""How similar anchors are to their matches, and to everything in a memory bank."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_itm.distributed import gather
from lightning_itm.functional.posterior import NUM_BINS, count_bins, histogram_posterior, similarity_bin
from lightning_itm.functional.similarity import DirectionScores

WINDOW = 16_384  # positives, of both directions: 64 steps of 128 pairs


class SimilarityHistograms(nn.Module):
    r"""Count similarities of anchors to their stored positives and to the stored candidates of other images.

    Old counts decay. A count weighs :math:`1/e` after 16,384 further positives, however many of them are in one step. All
    state is tensors on the device, and the same on every rank.

    Attributes:
        positives: `(400,)`, the histogram of anchors and their stored positives.
        candidates: `(400,)`, the histogram of the same anchors and all candidates of other images.
        new: `(2, 400)`, what was counted since the last :meth:`update`, positives first.
        posterior: `(400,)`, for each bin the probability that a candidate matches, as of the last :meth:`update`.

    Example:
        >>> import torch
        >>> from lightning_itm.functional import DirectionScores
        >>> from lightning_itm.functional.posterior import similarity_bin
        >>> from lightning_itm.memory_bank import SimilarityHistograms
        >>> histograms = SimilarityHistograms()
        >>> scores = DirectionScores(torch.zeros(2, 3), torch.ones(2), torch.ones(2, 3, dtype=torch.bool))
        >>> histograms.add(histograms.count(scores, similarity_bin(scores.similarity)))
        >>> histograms.update()
        >>> histograms.num_positives(), histograms.candidates[200]
        (tensor(2., dtype=torch.float64), tensor(6., dtype=torch.float64))
    """

    positives: Tensor
    candidates: Tensor
    new: Tensor
    posterior: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, shape in (("positives", ()), ("candidates", ()), ("new", (2,)), ("posterior", ())):
            self.register_buffer(name, torch.zeros(*shape, NUM_BINS, dtype=torch.float64))

    def reset(self) -> None:
        """Forget everything."""
        for buffer in self.buffers():
            buffer.zero_()

    @staticmethod
    def count(scores: DirectionScores, bins: Tensor) -> Tensor:
        """Count the positives and the candidates of some anchors.

        Args:
            scores: Some rows of the scores of one direction.
            bins: The bins of ``scores.similarity``, `(anchors, candidates)`.

        Returns:
            Both histograms, `(2, 400)`, positives first.
        """
        has_negatives = scores.negative_mask.any(dim=1)  # (anchors,), False where the stored positive is not finite
        positives = count_bins(similarity_bin(scores.positive), has_negatives)
        return torch.stack([positives, count_bins(bins, scores.negative_mask)])

    @torch.no_grad()
    def add(self, counts: Tensor) -> None:
        """Keep what all ranks have counted for the next :meth:`update`.

        Args:
            counts: `(2, 400)`, what :meth:`count` returned on this rank.
        """
        # Summed at once, not at the update: a checkpoint is saved by one rank and must hold the counts of all.
        self.new += gather(counts[None]).sum(dim=0)

    @torch.no_grad()
    def update(self) -> None:
        """Let old counts decay, put the new ones to them, and compute the posterior."""
        decay = torch.exp(-self.new[0].sum() / WINDOW)
        self.positives.mul_(decay).add_(self.new[0])
        self.candidates.mul_(decay).add_(self.new[1])
        self.new.zero_()
        self.posterior.copy_(histogram_posterior(self.positives, self.candidates))

    def num_positives(self) -> Tensor:
        """Return how many positives were counted, older ones with less weight, `()`."""
        return self.positives.sum()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # States of older versions have no histograms: counting starts anew.
        for name, histogram in self.named_buffers():
            state_dict.setdefault(prefix + name, torch.zeros_like(histogram))
        super()._load_from_state_dict(state_dict, prefix, *args)
