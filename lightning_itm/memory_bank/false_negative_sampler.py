"""A draw of negatives that knows how similar matching pairs and their hardest negatives are."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_itm.checks import check_choice
from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.functional.false_negatives import (
    DrawnNegative,
    Weighting,
    draw_negative,
    match_odds,
    sampling_weights,
)
from lightning_itm.functional.posterior import similarity_bin
from lightning_itm.functional.similarity import DirectionScores
from lightning_itm.memory_bank.candidates import MemoryDirection
from lightning_itm.memory_bank.similarity_histograms import SimilarityHistograms
from lightning_itm.memory_bank.similarity_statistics import SimilarityStatistics, row_chunks
from lightning_itm.randomness import uniform

Posterior = Literal["histogram", "published"]
COUNTS = "counts"  # beside the diagnostics of some rows
STATE_VERSION = 2  # since it has histograms
DEFAULT_THRESHOLD: dict[Posterior, float] = {"histogram": 0.5, "published": 1e-3}


class FalseNegativeSampler(nn.Module):
    r"""Choose negatives from a memory bank, and let those that probably match weigh less (FNE).

    Args:
        posterior: How to tell what probably matches. ``"histogram"`` compares the similarity of matching pairs with that of
            all candidates of the bank, and needs no prior: see :func:`~lightning_itm.functional.histogram_posterior`. It
            recognises as many duplicates at any batch size. Not in the paper. ``"published"`` fits two normal distributions,
            to matching pairs and to the hardest negative of each in its batch. It recognises duplicates in batches of 32 to
            128 pairs, fewer in larger ones, and hardly any from 512 to 1,024 on.
        prior: π, the fraction of candidates that match, though they belong to another image. Typically 1e-4. Only
            ``posterior="published"`` uses it.
        sharpness: τ, the factor in the hardness weight :math:`e^{-\tau (s - s^+)^2}`. The paper calls it a temperature.
        threshold: The posterior above which a candidate is taken for a likely match. Default: 0.5 for ``"histogram"``, and
            0.001, as published, for ``"published"``. Lower it to recognise more duplicates, at the cost of hard negatives.
        min_count: The number of positives that must be counted before anything is taken for a likely match. ``"histogram"``
            counts those of both directions, ``"published"`` those of the running epoch.
        weighting: What a likely match weighs. ``"exp"`` gives :math:`e^{-\tau P}`, as published, which is at least 0.61.
            ``"complement"`` gives :math:`1 - P`, and ``"drop"`` gives nothing. These two are not in the paper.
        monotone: Let the published posterior never fall as the similarity rises. Not in the paper. The other one never falls.
        cut_down: Which easy candidates weigh nothing, for losses with a margin: those whose similarity is lower by the margin
            than the mean positive (``"global"``, as published), or than the anchor's own positive (``"per_anchor"``), or
            none (``"off"``). The last two are not in the paper.
        seed: The seed of the draws. A draw depends on seed, epoch, step, direction, and text id.

    Diagnostics: ``mean_posterior``, ``false_negative_rate`` (the fraction of an anchor's negatives above the threshold) and
    ``fallback_fraction`` (anchors whose negatives all weighed nothing, so that the hardest was taken).

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import torch
        >>> from lightning_itm import FalseNegativeSampler
        >>> sampler = FalseNegativeSampler(weighting="drop")
        >>> sampler.posterior(torch.tensor([0.2, 0.9]))  # nothing was counted yet
        tensor([0., 0.])

    References:
        *Your Negative May not Be True Negative: Boosting Image-Text Matching with False Negative Elimination*,
        arXiv 2308.04380 (2023).
    """

    def __init__(
        self,
        *,
        posterior: Posterior = "histogram",
        prior: float = 1e-4,
        sharpness: float = 0.5,
        threshold: float | None = None,
        min_count: int = 200,
        weighting: Weighting = "exp",
        monotone: bool = False,
        cut_down: Literal["global", "per_anchor", "off"] = "global",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice("posterior", posterior, tuple(DEFAULT_THRESHOLD))
        threshold = DEFAULT_THRESHOLD[posterior] if threshold is None else threshold
        check_choice("weighting", weighting, ("exp", "complement", "drop"))
        check_choice("cut_down", cut_down, ("global", "per_anchor", "off"))
        for name, value in (("prior", prior), ("threshold", threshold)):
            if not 0 < value < 1:
                raise ValueError(f"Expected `{name}` to be between 0 and 1, got {value}.")
        for name, value in (("sharpness", sharpness), ("min_count", min_count)):
            if not value >= 0:
                raise ValueError(f"Expected `{name}` not to be negative, got {value}.")
        self.kind: Posterior = posterior
        self.prior, self.sharpness, self.threshold = prior, sharpness, threshold
        self.min_count, self.weighting, self.monotone, self.cut_down = min_count, weighting, monotone, cut_down
        self.seed, self.epoch, self.step, self.was_asked = seed, 0, 0, False
        self.statistics, self.histograms = SimilarityStatistics(), SimilarityHistograms()

    def start_step(self, epoch: int, step: int) -> None:
        """Begin a step. A new epoch empties the statistics, and a new run the histograms, too."""
        if epoch != self.epoch:
            self.statistics.reset()
        if epoch < self.epoch:  # a new run, which begins with another model
            self.histograms.reset()
        self.epoch, self.step, self.was_asked = epoch, step, False

    def observe(self, candidates: EmbeddingPairs) -> None:
        """Take the pairs of all ranks into the statistics."""
        self.was_asked = True
        self.statistics.update(candidates)
        if self.kind == "histogram":
            # Here, before the first draw of a step: all draws of the step see the same posterior.
            self.histograms.update()

    @torch.no_grad()
    def posterior(self, similarity: Tensor) -> Tensor:
        """Compute how likely candidates match, given what was seen up to this step.

        Args:
            similarity: Cosines of anchors and candidates of other images, of any shape.

        Returns:
            P, between 0 and 1, of the same shape. 0 before ``min_count`` positives were seen.
        """
        if self.kind == "histogram":
            return self._look_up(similarity_bin(similarity), similarity.dtype)
        is_ready = self.statistics.count[0] > self.min_count
        odds = match_odds(self.statistics.fit(), self.prior, monotone=self.monotone)
        return odds.posterior(similarity).mul_(is_ready)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled, it would be anew for every step's number
    @torch.no_grad()
    def draw(self, direction: MemoryDirection, *, margin: float | None) -> tuple[DrawnNegative, dict[str, Tensor]]:
        """Draw one negative for each anchor.

        Args:
            direction: The anchors and their candidates.
            margin: The margin of the hinge, which the cut-down needs. ``None`` leaves the cut-down out.

        Returns:
            The draws and the diagnostics.
        """
        similarity, positive = direction.similarity(), direction.positive_similarity()
        numbers = uniform(direction.draw_id, self.seed, self.epoch, self.step, direction.number)
        drawn, watched = [], []
        for rows in row_chunks(len(similarity), similarity.shape[1], similarity.device):
            scores = DirectionScores(similarity[rows], positive[rows], direction.negative_mask(rows))
            weights, diagnostics = self._weigh(scores, margin)
            drawn.append(draw_negative(scores, weights, numbers[rows]))
            watched.append(diagnostics)
        draws = DrawnNegative(*(torch.cat(parts) for parts in zip(*drawn, strict=True)))
        return draws, {**self._collect(watched), "fallback_fraction": draws.is_fallback}

    @torch.no_grad()
    def weights(self, scores: DirectionScores, *, margin: float | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Weigh every candidate of each anchor.

        Args:
            scores: The scores of one direction.
            margin: The margin of the hinge, which the cut-down needs. ``None`` leaves the cut-down out.

        Returns:
            The weights `(anchors, candidates)`, and the diagnostics.
        """
        weights, watched = torch.empty_like(scores.similarity), []
        for rows in row_chunks(len(weights), weights.shape[1], weights.device):
            part = DirectionScores(scores.similarity[rows], scores.positive[rows], scores.negative_mask[rows])
            weights[rows], diagnostics = self._weigh(part, margin)
            watched.append(diagnostics)
        return weights, self._collect(watched)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the epoch that the statistics are of."""
        return {"epoch": self.epoch, "version": STATE_VERSION}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on with the statistics of an epoch. Version 1, which said no version, had no histograms."""
        self.epoch = state["epoch"]

    def _weigh(self, scores: DirectionScores, margin: float | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Weigh the candidates of some rows of scores, `(rows, candidates)`."""
        counts = None
        if self.kind == "histogram":
            # The bins serve twice: to look the posterior up, and to count for the steps to come.
            bins = similarity_bin(scores.similarity)
            counts = self.histograms.count(scores, bins)
            posterior = self._look_up(bins, scores.similarity.dtype)
        else:
            posterior = self.posterior(scores.similarity)
        posterior = posterior.masked_fill_(~scores.negative_mask, 0)
        weights = sampling_weights(
            scores,
            posterior,
            sharpness=self.sharpness,
            threshold=self.threshold,
            weighting=self.weighting,
            cut=self._cut(scores, margin),
        )
        # Over all anchors of these rows: a sum for each takes ten times as long.
        number, rows = scores.negative_mask.count_nonzero().clamp_min(1), len(posterior)
        diagnostics = {
            "mean_posterior": (posterior.sum() / number).expand(rows),
            "false_negative_rate": ((posterior > self.threshold).count_nonzero() / number).expand(rows),
        }
        return weights, diagnostics if counts is None else {**diagnostics, COUNTS: counts}

    def _look_up(self, bins: Tensor, dtype: torch.dtype) -> Tensor:
        is_ready = self.histograms.num_positives() > self.min_count
        table = (self.histograms.posterior * is_ready).to(dtype)
        return table.index_select(0, bins.flatten()).view_as(bins)  # half the time of `table[bins]`

    def _cut(self, scores: DirectionScores, margin: float | None) -> Tensor | None:
        """Return the similarity up to which candidates weigh nothing, `()` or `(rows, 1)`."""
        if margin is None or self.cut_down == "off":
            return None
        is_global = self.cut_down == "global"
        positive = self.statistics.fit().positive_mean if is_global else scores.positive[:, None]
        return (positive - margin).to(scores.similarity.dtype)

    def _collect(self, watched: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Put the counts of all rows into the histograms, and the diagnostics together, `(anchors,)` each."""
        if self.kind == "histogram":
            self.histograms.add(torch.stack([part.pop(COUNTS) for part in watched]).sum(dim=0))
        return {name: torch.cat([part[name] for part in watched]) for name in watched[0]}
