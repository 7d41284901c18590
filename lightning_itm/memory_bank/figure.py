"""The similarities of a memory bank, and what the sampler makes of them, as one figure."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

from lightning_itm.functional.false_negatives import MIN_VARIANCE, false_negative_posterior
from lightning_itm.functional.posterior import similarity_bin
from lightning_itm.functional.similarity import negative_mask
from lightning_itm.memory_bank.false_negative_sampler import FalseNegativeSampler
from lightning_itm.memory_bank.queue import MemoryBank

MAX_PAIRS = 2048  # more pairs give the same picture: these have four million similarities
LOW, BINS = -0.5, 150  # lower cosines fall into the first bin


def plot_similarities(bank: MemoryBank, sampler: FalseNegativeSampler) -> Any:
    """Draw which candidates the sampler takes for matches.

    One figure shows histograms of the similarities of the pairs in the queue (matching ones and all others), the two fitted
    densities, and the posterior with its threshold. The posterior should rise only where matching pairs are.

    Args:
        bank: The queue to draw. Of a large one, 2,048 pairs are drawn.
        sampler: What estimates the posterior. Its statistics are those of the running epoch.

    Returns:
        A matplotlib figure. Save it with ``figure.savefig("similarities.png")``.

    Raises:
        ImportError: if matplotlib is not installed. It comes with ``pip install "lightning_itm[plot]"``.
    """
    # Here, because matplotlib is an extra that a run without figures does not need. A plain figure has no window to close.
    from matplotlib.figure import Figure

    fit = [value.cpu().double() for value in sampler.statistics.fit()]
    grid = torch.linspace(LOW, 1, 1201, dtype=torch.float64)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    kinds = (("negatives", "tab:red", "hardest negatives, fitted"), ("positives", "tab:blue", "positives, fitted"))
    counts = sampler.statistics.count.flip(0).tolist()
    for index, (similarities, (name, color, label)) in enumerate(zip(_similarities(bank), kinds, strict=True)):
        if len(similarities):
            # Counts to a density: the area of all bars is 1, as that of the fitted curves.
            heights = similarities.clamp(LOW, 1).histc(BINS, LOW, 1) * (BINS / (1 - LOW) / len(similarities))
            edges = torch.linspace(LOW, 1, BINS + 1)
            axes.stairs(heights, edges, fill=True, color=color, alpha=0.25, label=f"all {name} in the queue")
        if counts[index] > 1:
            # The fit names the positives first, and the negatives are drawn first.
            mean, variance = fit[2 - 2 * index], fit[3 - 2 * index].clamp_min(MIN_VARIANCE)
            axes.plot(grid, Normal(mean, variance.sqrt()).log_prob(grid).exp(), color=color, label=label)
    axes.set(xlabel="cosine similarity", ylabel="density", ylim=(0, None), title="Which candidates are likely matches?")
    right = axes.twinx()
    right.plot(grid, _posterior(sampler, grid), color="black", linestyle="--", label="posterior P (right)")
    right.axhline(sampler.threshold, color="gray", linewidth=0.8, linestyle=":", label="threshold (right)")
    right.set(ylabel="posterior of a match", yscale="log", ylim=(1e-6, 2))
    lines = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    # On the right axes, which are drawn later: no line crosses its words.
    legend = right.legend(lines, [str(line.get_label()) for line in lines], loc="upper left")
    legend.get_frame().set(edgecolor="none", alpha=0.9)
    axes.spines[["top"]].set_visible(False)
    right.spines[["top"]].set_visible(False)
    return figure


def _posterior(sampler: FalseNegativeSampler, grid: Tensor) -> Tensor:
    """Compute P at each similarity of the grid, also before ``min_count`` positives were seen."""
    if sampler.kind == "histogram":
        return sampler.histograms.posterior.cpu().double()[similarity_bin(grid).long()]
    fit = sampler.statistics.fit()
    names = ("positive_mean", "positive_var", "negative_mean", "negative_var")
    statistics = {name: value.cpu().double() for name, value in zip(names, fit, strict=True)}
    return false_negative_posterior(grid, **statistics, prior=sampler.prior, monotone=sampler.monotone)


def _similarities(bank: MemoryBank) -> tuple[Tensor, Tensor]:
    """Return the similarities in the queue: those of other images, then those of matching pairs."""
    kept = bank.valid.nonzero().squeeze(1)[:MAX_PAIRS]
    ids = bank.image_id[kept], bank.image_id[kept], bank.caption_id[kept], bank.caption_id[kept]
    similarity = bank.image[kept].float() @ bank.text[kept].float().T  # (kept, kept)
    return similarity[negative_mask(*ids)].cpu(), similarity.diagonal().cpu()
