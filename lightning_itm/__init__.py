"""Better negatives for fine-tuning CLIP and other dual encoders, as a PyTorch Lightning plugin."""

from lightning_itm.callbacks.embedding_writer import EmbeddingWriter
from lightning_itm.callbacks.false_negative_elimination import FalseNegativeElimination
from lightning_itm.callbacks.gradient_norm_monitor import GradientNormMonitor
from lightning_itm.callbacks.negative_writer import NegativeWriter
from lightning_itm.callbacks.offline_hard_negative_mining import OfflineHardNegativeMining
from lightning_itm.data.batch import ImageTextBatch, collate
from lightning_itm.data.datamodule import ImageTextDataModule
from lightning_itm.data.files_datamodule import ImageTextFiles, read_pairs
from lightning_itm.data.padded_sequence import PaddedSequence
from lightning_itm.data.pairs import ImageTextPairs
from lightning_itm.data.region_features import RegionPairs, Vocabulary
from lightning_itm.data.shards.dataset import ShardPairs
from lightning_itm.data.shards.stream import ShardStream
from lightning_itm.data.shards.writer import verify_shards, write_shards
from lightning_itm.data.transforms import open_clip_transforms
from lightning_itm.embeddings import EmbeddingPairs, HardNegatives
from lightning_itm.losses.base import PairLoss
from lightning_itm.losses.contrastive import InfoNCELoss, SigmoidLoss
from lightning_itm.losses.quintuplet import QuintupletLoss
from lightning_itm.losses.triplet import TripletLoss
from lightning_itm.memory_bank.candidates import MemoryCandidates, MemoryDirection, NegativeSampler
from lightning_itm.memory_bank.false_negative_sampler import FalseNegativeSampler
from lightning_itm.memory_bank.momentum_encoder import MomentumEncoder
from lightning_itm.memory_bank.queue import MemoryBank
from lightning_itm.memory_bank.similarity_statistics import SimilarityStatistics
from lightning_itm.metrics.image_text_retrieval import ImageTextRetrieval
from lightning_itm.metrics.zero_shot import zero_shot_accuracy
from lightning_itm.mining.hard_negative_dataset import HardNegativePairs
from lightning_itm.mining.negative_table import NegativeTable
from lightning_itm.models.dual_encoder import DualEncoder
from lightning_itm.models.open_clip_dual_encoder import OpenCLIPDualEncoder
from lightning_itm.models.residual_vse import GeneralizedPooling, RegionEncoder, ResidualVSE, WordEncoder
from lightning_itm.models.weight_interpolation import interpolate_weights

__all__ = [
    "DualEncoder",
    "EmbeddingPairs",
    "EmbeddingWriter",
    "FalseNegativeElimination",
    "FalseNegativeSampler",
    "GeneralizedPooling",
    "GradientNormMonitor",
    "HardNegativePairs",
    "HardNegatives",
    "ImageTextBatch",
    "ImageTextDataModule",
    "ImageTextFiles",
    "ImageTextPairs",
    "ImageTextRetrieval",
    "InfoNCELoss",
    "MemoryBank",
    "MemoryCandidates",
    "MemoryDirection",
    "MomentumEncoder",
    "NegativeSampler",
    "NegativeTable",
    "NegativeWriter",
    "OfflineHardNegativeMining",
    "OpenCLIPDualEncoder",
    "PaddedSequence",
    "PairLoss",
    "QuintupletLoss",
    "RegionEncoder",
    "RegionPairs",
    "ResidualVSE",
    "ShardPairs",
    "ShardStream",
    "SigmoidLoss",
    "SimilarityStatistics",
    "TripletLoss",
    "Vocabulary",
    "WordEncoder",
    "collate",
    "interpolate_weights",
    "open_clip_transforms",
    "read_pairs",
    "verify_shards",
    "write_shards",
    "zero_shot_accuracy",
]
