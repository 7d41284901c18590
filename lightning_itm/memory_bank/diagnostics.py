"""What is worth watching of a memory bank."""

import torch
from torch import Tensor

from lightning_itm.memory_bank.agreement import Agreement
from lightning_itm.memory_bank.false_negative_sampler import FalseNegativeSampler
from lightning_itm.memory_bank.queue import MemoryBank


def memory_diagnostics(
    bank: MemoryBank, sampler: FalseNegativeSampler, agreement: Agreement, *, is_always_in: bool
) -> dict[str, Tensor]:
    """Return one number `()` per name, on the device.

    Args:
        bank: Its share of filled places is ``fill``.
        sampler: Its similarities are ``positive_mean``, ``positive_std``, ``negative_mean``, ``negative_std``, and
            ``num_positives`` is how many positives it counted in this epoch.
        agreement: ``live_in_stored``, ``stored_in_stored`` and ``cosine``.
        is_always_in: The bank is in the loss whatever the agreement says (``in_loss``).
    """
    fit = sampler.statistics.fit()
    live_in_stored, stored_in_stored = agreement.ratios()
    return {
        "fill": bank.fill(),
        "in_loss": torch.ones_like(agreement.is_met) if is_always_in else agreement.is_met.clone(),
        "live_in_stored": live_in_stored,
        "stored_in_stored": stored_in_stored,
        "cosine": agreement.mean_cosine(),
        "positive_mean": fit.positive_mean,
        "positive_std": fit.positive_var.sqrt(),
        "negative_mean": fit.negative_mean,
        "negative_std": fit.negative_var.sqrt(),
        "num_positives": sampler.statistics.count[0].clone(),
    }
