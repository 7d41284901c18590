"""Better negatives for fine-tuning CLIP and other dual encoders, as a PyTorch Lightning plugin."""

from lightning_itm.data.batch import EmbeddingPairs, ImageTextBatch, collate
from lightning_itm.data.datamodule import ImageTextDataModule
from lightning_itm.data.pairs import ImageTextPairs
from lightning_itm.modules.dual_encoder import DualEncoder
from lightning_itm.modules.losses import InfoNCELoss, SigmoidLoss, TripletLoss
from lightning_itm.modules.open_clip import OpenCLIPDualEncoder
from lightning_itm.modules.retrieval import ImageTextRetrieval

__all__ = [
    "DualEncoder",
    "EmbeddingPairs",
    "ImageTextBatch",
    "ImageTextDataModule",
    "ImageTextPairs",
    "ImageTextRetrieval",
    "InfoNCELoss",
    "OpenCLIPDualEncoder",
    "SigmoidLoss",
    "TripletLoss",
    "collate",
]
