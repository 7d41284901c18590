"""Negatives from earlier batches: a queue of their embeddings, and a draw that avoids likely matches.

A slow copy of the model (``MomentumEncoder``) embeds each batch. A queue (``MemoryBank``) keeps the last few thousand pairs.
They travel to the loss as ``batch["memory"]`` (``MemoryCandidates``). There the ``FalseNegativeSampler`` draws or weighs them,
from the ``SimilarityStatistics`` of this epoch. ``Agreement`` says when stored embeddings are good enough to take part.
``lightning_itm.FalseNegativeElimination`` is the callback that puts these parts together.
"""

from lightning_itm.memory_bank.agreement import Agreement
from lightning_itm.memory_bank.candidates import MemoryCandidates, MemoryDirection, NegativeSampler
from lightning_itm.memory_bank.false_negative_sampler import FalseNegativeSampler
from lightning_itm.memory_bank.figure import plot_similarities
from lightning_itm.memory_bank.momentum_encoder import MomentumEncoder
from lightning_itm.memory_bank.queue import MemoryBank
from lightning_itm.memory_bank.similarity_histograms import SimilarityHistograms
from lightning_itm.memory_bank.similarity_statistics import SimilarityStatistics

__all__ = [
    "Agreement",
    "FalseNegativeSampler",
    "MemoryBank",
    "MemoryCandidates",
    "MemoryDirection",
    "MomentumEncoder",
    "NegativeSampler",
    "SimilarityHistograms",
    "SimilarityStatistics",
    "plot_similarities",
]
