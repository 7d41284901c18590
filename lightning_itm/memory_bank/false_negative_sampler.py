"""A draw of negatives that knows how similar matching pairs and their hardest negatives are."""

from collections.abc import Callable
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
from lightning_itm.functional.similarity import DirectionScores
from lightning_itm.memory_bank.candidates import MemoryDirection
from lightning_itm.memory_bank.similarity_statistics import SimilarityStatistics, row_chunks
from lightning_itm.randomness import uniform


class FalseNegativeSampler(nn.Module):
    r"""Draw negatives that are likely to be negative in truth (FNE).

    Args:
        prior: π, the share of candidates that match though they belong to another image.
        sharpness: τ, of the hardness weight :math:`e^{-\tau (s - s^+)^2}`. The paper calls it a temperature.
        threshold: The posterior above which a candidate is taken for a likely match.
        min_count: Positives that must be counted in an epoch before posteriors are used.
        weighting: What a likely match weighs: ``"exp"``, :math:`e^{-\tau P}`, as published; ``"complement"``,
            :math:`1 - P` (ours); ``"drop"``, nothing (ours).
        monotone: Let the posterior never fall as the similarity rises (ours).
        cut_down: Candidates whose similarity is lower by the margin than: ``"global"``, the mean positive, as published;
            ``"per_anchor"``, the anchor's own positive (ours), weigh nothing; ``"off"`` (ours): all weigh. Losses
            without a margin have no cut-down.
        seed: Of the draws, which are functions of (seed, epoch, step, direction, text id).

    Diagnostics: ``mean_posterior``, ``false_negative_rate`` (the share of an anchor's negatives above the threshold) and
    ``fallback_fraction`` (anchors for whom every negative weighed nothing, so that the hardest was taken).

    Raises:
        ValueError: An argument out of its range.

    References:
        *Your Negative May not Be True Negative: Boosting Image-Text Matching with False Negative Elimination*,
        arXiv 2308.04380 (2023).
    """

    def __init__(
        self,
        *,
        prior: float = 1e-4,
        sharpness: float = 0.5,
        threshold: float = 1e-3,
        min_count: int = 200,
        weighting: Weighting = "exp",
        monotone: bool = False,
        cut_down: Literal["global", "per_anchor", "off"] = "global",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice("weighting", weighting, ("exp", "complement", "drop"))
        check_choice("cut_down", cut_down, ("global", "per_anchor", "off"))
        for name, value in (("prior", prior), ("threshold", threshold)):
            if not 0 < value < 1:
                raise ValueError(f"Expected `{name}` to be between 0 and 1, got {value}.")
        for name, value in (("sharpness", sharpness), ("min_count", min_count)):
            if not value >= 0:
                raise ValueError(f"Expected `{name}` not to be negative, got {value}.")
        self.prior, self.sharpness, self.threshold = prior, sharpness, threshold
        self.min_count, self.weighting, self.monotone, self.cut_down = min_count, weighting, monotone, cut_down
        self.seed, self.epoch, self.step, self.was_asked = seed, 0, 0, False
        self.statistics = SimilarityStatistics()

    def start_step(self, epoch: int, step: int) -> None:
        """Say which step comes: statistics are of one epoch, draws of one step."""
        if epoch != self.epoch:
            self.statistics.reset()
        self.epoch, self.step, self.was_asked = epoch, step, False

    def observe(self, candidates: EmbeddingPairs) -> None:
        """Take the pairs of all ranks into the statistics."""
        self.was_asked = True
        self.statistics.update(candidates)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled, it would be anew for every step's number
    @torch.no_grad()
    def draw(self, direction: MemoryDirection, *, margin: float | None) -> tuple[DrawnNegative, dict[str, Tensor]]:
        """Draw one negative for each anchor.

        Args:
            direction: Anchors and candidates.
            margin: Of the hinge; ``None``: no cut-down.

        Returns:
            The draws and the diagnostics.
        """
        similarity, positive = direction.similarity(), direction.positive_similarity()
        numbers = uniform(direction.draw_id, self.seed, self.epoch, self.step, direction.number)
        weigh = self._weigher(margin)
        drawn, watched = [], []
        for rows in row_chunks(len(similarity), similarity.shape[1], similarity.device):
            scores = DirectionScores(similarity[rows], positive[rows], direction.negative_mask(rows))
            weights, diagnostics = weigh(scores)
            drawn.append(draw_negative(scores, weights, numbers[rows]))
            watched.append(diagnostics)
        draws = DrawnNegative(*(torch.cat(parts) for parts in zip(*drawn, strict=True)))
        means = {name: torch.cat([part[name] for part in watched]) for name in watched[0]}
        return draws, {**means, "fallback_fraction": draws.is_fallback}

    @torch.no_grad()
    def weights(self, scores: DirectionScores, *, margin: float | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Weigh every candidate of each anchor.

        Args:
            scores: The scores of one direction.
            margin: Of the hinge; ``None``: no cut-down.

        Returns:
            The weights `(anchors, candidates)`, and the diagnostics.
        """
        weigh, weights, watched = self._weigher(margin), torch.empty_like(scores.similarity), []
        for rows in row_chunks(len(weights), weights.shape[1], weights.device):
            part = DirectionScores(scores.similarity[rows], scores.positive[rows], scores.negative_mask[rows])
            weights[rows], diagnostics = weigh(part)
            watched.append(diagnostics)
        return weights, {name: torch.cat([part[name] for part in watched]) for name in watched[0]}

    def get_extra_state(self) -> dict[str, Any]:
        """Return the epoch that the statistics are of."""
        return {"epoch": self.epoch}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on with the statistics of an epoch."""
        self.epoch = state["epoch"]

    def _weigher(self, margin: float | None) -> Callable[[DirectionScores], tuple[Tensor, dict[str, Tensor]]]:
        """Prepare, once, what weighs some rows of scores."""
        statistics = self.statistics
        fit, is_ready = statistics.fit(), statistics.count[0] > self.min_count
        odds = match_odds(fit, self.prior, monotone=self.monotone)

        def weigh(scores: DirectionScores) -> tuple[Tensor, dict[str, Tensor]]:
            cut = None
            if margin is not None and self.cut_down != "off":
                positive = fit.positive_mean if self.cut_down == "global" else scores.positive[:, None]
                cut = (positive - margin).to(scores.similarity.dtype)
            posterior = odds.posterior(scores.similarity).mul_(is_ready).masked_fill_(~scores.negative_mask, 0)
            weights = sampling_weights(
                scores,
                posterior,
                sharpness=self.sharpness,
                threshold=self.threshold,
                weighting=self.weighting,
                cut=cut,
            )
            # Over all anchors of these rows: a sum for each takes ten times as long.
            number, rows = scores.negative_mask.count_nonzero().clamp_min(1), len(posterior)
            return weights, {
                "mean_posterior": (posterior.sum() / number).expand(rows),
                "false_negative_rate": ((posterior > self.threshold).count_nonzero() / number).expand(rows),
            }

        return weigh
