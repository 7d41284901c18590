"""What a batch is, and which pairs come together: pairs, how they are read, and loaders that go on where a run stopped."""

from lightning_itm.data.batch import ImageTextBatch, PaddedSequence, check_batch, collate_pairs
from lightning_itm.data.compositional import CompositionalDataset, CompositionalFilesDataModule
from lightning_itm.data.datamodule import ImageTextDataModule
from lightning_itm.data.evaluation_items import EvaluationItems, TextsOfImages
from lightning_itm.data.files_datamodule import ImageTextFilesDataModule, read_pairs
from lightning_itm.data.image import UnreadableImageError, open_clip_transforms, open_rgb, to_tensor
from lightning_itm.data.pairs import ImageTextDataset, UnreadablePairError
from lightning_itm.data.region_features import FeatureRows, RegionFeatureDataset, Vocabulary
from lightning_itm.data.resumable_loader import (
    EpochOrder,
    EpochSampler,
    OrderedDataset,
    ResumableLoader,
    SeededDataset,
    random_order,
)
from lightning_itm.data.shards import ShardDataset, ShardIndex, ShardStream, verify_shards, write_shards

__all__ = [
    "CompositionalDataset",
    "CompositionalFilesDataModule",
    "EpochOrder",
    "EpochSampler",
    "EvaluationItems",
    "FeatureRows",
    "ImageTextBatch",
    "ImageTextDataModule",
    "ImageTextDataset",
    "ImageTextFilesDataModule",
    "OrderedDataset",
    "PaddedSequence",
    "RegionFeatureDataset",
    "ResumableLoader",
    "SeededDataset",
    "ShardDataset",
    "ShardIndex",
    "ShardStream",
    "TextsOfImages",
    "UnreadableImageError",
    "UnreadablePairError",
    "Vocabulary",
    "check_batch",
    "collate_pairs",
    "open_clip_transforms",
    "open_rgb",
    "random_order",
    "read_pairs",
    "to_tensor",
    "verify_shards",
    "write_shards",
]
