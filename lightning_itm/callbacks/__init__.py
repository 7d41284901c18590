"""When things happen: one callback per file, the file named after it."""

from lightning_itm.callbacks.embedding_writer import EmbeddingWriter
from lightning_itm.callbacks.false_negative_elimination import FalseNegativeElimination
from lightning_itm.callbacks.gradient_norm_monitor import GradientNormMonitor
from lightning_itm.callbacks.negative_writer import NegativeWriter
from lightning_itm.callbacks.offline_hard_negative_mining import OfflineHardNegativeMining

__all__ = [
    "EmbeddingWriter",
    "FalseNegativeElimination",
    "GradientNormMonitor",
    "NegativeWriter",
    "OfflineHardNegativeMining",
]
