"""The similarities of a memory bank, and what the sampler makes of them, as one figure."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

from lightning_itm.functional.false_negatives import MIN_VARIANCE, false_negative_posterior
from lightning_itm.modules.false_negatives import FalseNegativeSampler
from lightning_itm.modules.memory_bank import MemoryBank

MAX_PAIRS = 2048  # of the queue; four million similarities


def plot_similarities(bank: MemoryBank, sampler: FalseNegativeSampler) -> Any:
    """Draw histograms of the pairs of the queue, the two fitted densities, and the posterior.

    Args:
        bank: The queue.
        sampler: Its statistics are those of the running epoch.

    Returns:
        A matplotlib figure.
    """
    import matplotlib.pyplot as plt

    fit = [value.cpu() for value in sampler.statistics.fit()]
    positive, negative = _similarities(bank)
    grid = torch.linspace(-0.2, 1, 1201, dtype=torch.float64)
    (figure, axes), step = plt.subplots(figsize=(9, 5), layout="constrained"), 0.01
    edges = torch.arange(-0.2, 1 + step, step).tolist()
    for values, mean, variance, color, name in (
        (negative, fit[2], fit[3], "tab:red", "negatives"),
        (positive, fit[0], fit[1], "tab:blue", "positives"),
    ):
        axes.hist(values.tolist(), edges, density=True, color=color, alpha=0.25, label=f"all {name} in the queue")
        density = Normal(mean, variance.clamp_min(MIN_VARIANCE).sqrt()).log_prob(grid).exp()
        label = "positives, fitted" if name == "positives" else "hardest negatives, fitted"
        axes.plot(grid, density, color=color, label=label)
    axes.set(xlabel="cosine similarity", ylabel="density", ylim=(0, None), title="Which candidates are likely matches?")
    right = axes.twinx()
    statistics = dict(zip(("positive_mean", "positive_var", "negative_mean", "negative_var"), fit, strict=True))
    posterior = false_negative_posterior(grid, **statistics, prior=sampler.prior, monotone=sampler.monotone)
    right.plot(grid, posterior, color="black", linestyle="--", label="posterior P (right)")
    right.axhline(sampler.threshold, color="gray", linewidth=0.8, linestyle=":", label="threshold (right)")
    right.set(ylabel="posterior of a match", ylim=(0, 1.02))
    lines = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    axes.legend(lines, [str(line.get_label()) for line in lines], frameon=False, loc="upper left")
    axes.spines[["top"]].set_visible(False)
    right.spines[["top"]].set_visible(False)
    return figure


def _similarities(bank: MemoryBank) -> tuple[Tensor, Tensor]:
    kept = bank.valid.nonzero().squeeze(1)[:MAX_PAIRS]
    image, text, image_id = bank.image[kept].float(), bank.text[kept].float(), bank.image_id[kept]
    similarity = image @ text.T
    return similarity.diagonal().cpu(), similarity[image_id[:, None] != image_id].cpu()
