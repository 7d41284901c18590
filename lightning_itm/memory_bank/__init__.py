"""Where negatives come from: a queue of earlier pairs, embedded by a slow copy, and a draw that avoids false ones (FNE)."""

from lightning_itm.memory_bank.agreement import Agreement
from lightning_itm.memory_bank.candidates import MemoryCandidates, MemoryDirection, NegativeSampler
from lightning_itm.memory_bank.false_negative_sampler import FalseNegativeSampler
from lightning_itm.memory_bank.figure import plot_similarities
from lightning_itm.memory_bank.momentum_encoder import MomentumEncoder
from lightning_itm.memory_bank.queue import MemoryBank
from lightning_itm.memory_bank.similarity_statistics import SimilarityStatistics

__all__ = [
    "Agreement",
    "FalseNegativeSampler",
    "MemoryBank",
    "MemoryCandidates",
    "MemoryDirection",
    "MomentumEncoder",
    "NegativeSampler",
    "SimilarityStatistics",
    "plot_similarities",
]
