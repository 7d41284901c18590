"""The triplet loss with its rules for which negative counts."""

from typing import Literal

import torch
from torch import Tensor

from lightning_itm.checks import check_choice
from lightning_itm.functional.similarity import DirectionScores, hardest_negative
from lightning_itm.functional.triplet import hardest_cost, mean_cost, selective_cost
from lightning_itm.losses.base import DirectionCost, PairLoss, row_similarity
from lightning_itm.memory_bank.candidates import MemoryCandidates, MemoryDirection


class TripletLoss(PairLoss):
    r"""Ask that each positive is more similar than a negative by a margin (VSE++, SelHN).

    .. math:: [m - s^+ + s^-]_+

    In plain terms: if the negative is less similar than the positive by at least the margin, the anchor costs nothing. The
    option ``negatives`` says which negative that is:

    - ``"hardest"`` (VSE++) takes the most similar negative. It is the strongest signal, for a model that already ranks well,
      such as a pretrained CLIP.
    - ``"mean"`` takes the mean of the costs of all negatives. It is weak later on, but safe from the first step.
    - ``"selective"`` (SelHN) takes the hardest. Where it is as similar as the positive, the gradient of the hardest vanishes,
      and the mean is used instead. Use it to train from scratch, where ``"hardest"`` may collapse to a single point. Or start
      with ``"hardest"`` and let :class:`~lightning_itm.GradientNormMonitor` switch the rule on when a collapse begins.

    Args:
        margin: m, in units of cosine similarity, often 0.1 to 0.3. A larger margin keeps more anchors active.
        negatives: Which negative counts, ``"hardest"``, ``"selective"`` or ``"mean"``, as above.
        epsilon: How close the similarities of the positive and the hardest negative must be for ``"selective"`` to take the
            mean. The default, 0.01, is the paper's.
        memory: What a memory bank does. ``"added"``: the hinge of the negative drawn from it is added to that of the batch.
            Not in the paper. ``"instead"``: it replaces that of the batch, as FNE is published.
        reduction: ``"mean"`` over the anchors and both directions, or ``"sum"``, which multiplies it by twice the number of
            pairs on all ranks. Use ``"sum"`` only with a learning rate that was published for it.

    Logs ``active_fraction``, the fraction of anchors that cost anything. Where the selective rule is on, it also logs
    ``averaged_fraction``, the fraction of anchors that took the mean.

    Raises:
        ValueError: if ``margin`` or ``epsilon`` is not positive, or ``negatives``, ``memory`` or ``reduction`` is unknown.

    Example:
        >>> import torch
        >>> from lightning_itm import TripletLoss
        >>> from lightning_itm.embeddings import EmbeddingPairs
        >>> ids = torch.arange(2)
        >>> orthogonal = EmbeddingPairs(torch.eye(2), torch.eye(2), ids, ids)
        >>> TripletLoss(margin=1.2)(orthogonal)["loss"]
        tensor(0.2000)

    References:
        VSE++: Faghri et al., BMVC 2018. SelHN: arXiv 2303.00181 (2023), with ``epsilon=0.01``. Both published codes count
        every other pair of the batch as a negative; here pairs of the same image are none.
    """

    def __init__(
        self,
        margin: float = 0.2,
        negatives: Literal["hardest", "selective", "mean"] = "hardest",
        *,
        epsilon: float = 0.01,
        memory: Literal["added", "instead"] = "added",
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        check_choice("memory", memory, ("added", "instead"))
        check_choice("negatives", negatives, ("hardest", "selective", "mean"))
        for name, value in (("margin", margin), ("epsilon", epsilon)):
            if not value > 0:
                raise ValueError(f"Expected `{name}` to be positive, got {value}.")
        self.margin, self.negatives, self.epsilon, self.memory = margin, negatives, epsilon, memory

    @property
    def has_selective_rule(self) -> bool:
        """Whether there is a rule to switch. With the mean over all negatives there is none."""
        return self.negatives != "mean"

    @property
    def memory_replaces_batch(self) -> bool:
        """Whether a memory bank replaces the negatives of the batch, as FNE is published."""
        return self.memory == "instead"

    def direction_cost(self, scores: DirectionScores, selective: Tensor | None) -> DirectionCost:
        """Compute the hinge cost of each anchor with the functions of :mod:`lightning_itm.functional.triplet`."""
        rule = {}
        # A tensor in `selective` overrules the constructor, also with False everywhere: the rule then stays off.
        if self._is_selective(selective):
            cost, averaged = selective_cost(scores, margin=self.margin, epsilon=self.epsilon, enabled=selective)
            rule = {"averaged_fraction": averaged}
        elif self.negatives == "mean":
            cost = mean_cost(scores, margin=self.margin)
        else:
            cost = hardest_cost(scores, margin=self.margin)
        return DirectionCost(cost, {"active_fraction": cost > 0, **rule}, hardest_negative(scores))

    def memory_cost(self, batch: DirectionCost, direction: MemoryDirection, memory: MemoryCandidates) -> DirectionCost:
        """Compute the hinge of each anchor's draw from the memory bank, added to the batch's or instead of it.

        Instead of it, an anchor whose hardest negative *in the batch* is as similar as its positive keeps the mean over the
        batch where the selective rule is on. Not in the paper.
        """
        # One candidate per anchor, (anchors, dim). Where none could be drawn, -inf makes the hinge zero.
        drawn, diagnostics = memory.sampler.draw(direction, margin=self.margin)
        negative = row_similarity(direction.anchor, direction.candidate[drawn.candidate_index])
        negative = negative.masked_fill(~drawn.is_negative, -torch.inf)  # (anchors,)
        stored = (self.margin - direction.positive_similarity() + negative).clamp_min(0)
        if self.memory == "added":
            return self.with_memory(batch, stored, memory, diagnostics)
        is_averaged = batch.diagnostics.get("averaged_fraction")
        if is_averaged is not None and batch.negative is not None:
            stored = torch.where(is_averaged, batch.cost, stored)
            negative = torch.where(is_averaged, batch.negative, negative)
        cost = memory.if_in_loss(stored, batch.cost)
        of_batch = negative if batch.negative is None else batch.negative
        diagnostics = {**batch.diagnostics, **diagnostics, "active_fraction": cost > 0}
        return DirectionCost(cost, diagnostics, memory.if_in_loss(negative, of_batch))

    def _is_selective(self, selective: Tensor | None) -> bool:
        return self.negatives == "selective" or selective is not None

    def extra_repr(self) -> str:
        """Show the arguments in the model summary."""
        return (
            f"margin={self.margin}, negatives={self.negatives!r}, epsilon={self.epsilon}, memory={self.memory!r}, "
            f"reduction={self.reduction!r}"
        )
