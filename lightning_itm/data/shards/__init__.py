"""Pairs in tar shards: written, read by number, and read from front to back."""

from lightning_itm.data.shards.dataset import ShardDataset
from lightning_itm.data.shards.index import ShardIndex
from lightning_itm.data.shards.loader import StreamedBatches, StreamLoader
from lightning_itm.data.shards.paths import find_shards
from lightning_itm.data.shards.stream import ShardStream
from lightning_itm.data.shards.writer import verify_shards, write_shards

__all__ = [
    "ShardDataset",
    "ShardIndex",
    "ShardStream",
    "StreamLoader",
    "StreamedBatches",
    "find_shards",
    "verify_shards",
    "write_shards",
]
