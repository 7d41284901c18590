"""Better negatives for fine-tuning CLIP and other dual encoders, as a PyTorch Lightning plugin.

Here stand the names of a training script. Every room exports the rest: ``lightning_itm.losses``, ``.metrics``, ``.mining``,
``.memory_bank``, ``.gradient_monitor``, ``.models``, ``.data``, ``.embeddings``, ``.functional``, ``.export``.
"""

from importlib.metadata import version

from lightning_itm.callbacks import (
    EmbeddingWriter,
    FalseNegativeElimination,
    GradientNormMonitor,
    NegativeWriter,
    OfflineHardNegativeMining,
)
from lightning_itm.data import (
    ImageTextDataModule,
    ImageTextDataset,
    ImageTextFilesDataModule,
    RegionFeatureDataset,
    ShardDataset,
    ShardStream,
    write_shards,
)
from lightning_itm.losses import InfoNCELoss, QuintupletLoss, SigmoidLoss, TripletLoss
from lightning_itm.memory_bank import FalseNegativeSampler
from lightning_itm.metrics import ImageTextRetrieval, zero_shot_accuracy
from lightning_itm.mining import HardNegativeDataset
from lightning_itm.models import DualEncoder, HFDualEncoder, OpenCLIPDualEncoder, ResidualVSE, interpolate_weights
from lightning_itm.standalone import mine

__all__ = [
    "DualEncoder",
    "EmbeddingWriter",
    "FalseNegativeElimination",
    "FalseNegativeSampler",
    "GradientNormMonitor",
    "HFDualEncoder",
    "HardNegativeDataset",
    "ImageTextDataModule",
    "ImageTextDataset",
    "ImageTextFilesDataModule",
    "ImageTextRetrieval",
    "InfoNCELoss",
    "NegativeWriter",
    "OfflineHardNegativeMining",
    "OpenCLIPDualEncoder",
    "QuintupletLoss",
    "RegionFeatureDataset",
    "ResidualVSE",
    "ShardDataset",
    "ShardStream",
    "SigmoidLoss",
    "TripletLoss",
    "interpolate_weights",
    "mine",
    "write_shards",
    "zero_shot_accuracy",
]

__version__ = version("lightning_itm")
"""The release that is installed, as in ``pyproject.toml``."""
