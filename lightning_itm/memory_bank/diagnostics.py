"""What is worth watching of a memory bank."""

import torch
from torch import Tensor

from lightning_itm.memory_bank.agreement import Agreement
from lightning_itm.memory_bank.false_negative_sampler import FalseNegativeSampler
from lightning_itm.memory_bank.queue import MemoryBank


def memory_diagnostics(
    bank: MemoryBank, sampler: FalseNegativeSampler, agreement: Agreement, *, is_always_in: bool
) -> dict[str, Tensor]:
    """Collect what to log about a memory bank: one number `()` per name, on the device.

    Args:
        bank: The queue gives ``fill``, the fraction of its places that hold a pair.
        sampler: Its statistics of this epoch give ``positive_mean``, ``positive_std``, ``negative_mean``, ``negative_std``
            (cosine similarities), and ``num_positives``, how many positives it counted.
        agreement: It gives ``live_in_stored``, ``stored_in_stored`` (ratios, about 1 when all is well) and ``cosine``.
        is_always_in: True where the bank is in the loss whatever the agreement says. Then ``in_loss`` is 1.
    """
    fit = sampler.statistics.fit()
    live_in_stored, stored_in_stored = agreement.ratios()
    # Copies, not the buffers themselves: loggers read them later, when a next step has written into the buffers.
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
