"""The embeddings of a whole set: all of them on each rank, or on each rank its part."""

from lightning_itm.mining.encoded.pairs import EncodedPairs, ReadablePairs, mean_of_texts
from lightning_itm.mining.encoded.rows import EncodedRows, OwnRows
from lightning_itm.mining.encoded.split import Division, SplitPairs, SplitRows, rows_of_all_ranks

__all__ = [
    "Division",
    "EncodedPairs",
    "EncodedRows",
    "OwnRows",
    "ReadablePairs",
    "SplitPairs",
    "SplitRows",
    "mean_of_texts",
    "rows_of_all_ranks",
]
