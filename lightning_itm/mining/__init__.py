"""Where negatives come from: the whole training set, encoded, searched, and drawn from with the pairs (AOQ)."""

from lightning_itm.mining.embedded_negatives import EmbeddedNegatives
from lightning_itm.mining.encode import EncodedPairs, EvaluationItems, collate_items, encode_pairs
from lightning_itm.mining.figure import contact_sheet
from lightning_itm.mining.hard_negative_dataset import HardNegativeDataset
from lightning_itm.mining.negative_table import NegativeTable
from lightning_itm.mining.search import FoundNegatives, find_negatives

__all__ = [
    "EmbeddedNegatives",
    "EncodedPairs",
    "EvaluationItems",
    "FoundNegatives",
    "HardNegativeDataset",
    "NegativeTable",
    "collate_items",
    "contact_sheet",
    "encode_pairs",
    "find_negatives",
]
