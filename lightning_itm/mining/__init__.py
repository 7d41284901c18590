"""Where negatives come from: the whole training set, encoded, searched, and drawn from with the pairs (AOQ)."""

from lightning_itm.mining.embedded_negatives import EmbeddedNegatives
from lightning_itm.mining.encode import encode_pairs
from lightning_itm.mining.encoded import EncodedPairs, EncodedRows
from lightning_itm.mining.figure import contact_sheet
from lightning_itm.mining.hard_batches import HardBatches, compose_batches
from lightning_itm.mining.hard_negative_dataset import HardNegativeDataset
from lightning_itm.mining.negative_table import NegativeTable, draw_from_rows
from lightning_itm.mining.search import MinedNegatives, find_negatives

__all__ = [
    "EmbeddedNegatives",
    "EncodedPairs",
    "EncodedRows",
    "HardBatches",
    "HardNegativeDataset",
    "MinedNegatives",
    "NegativeTable",
    "compose_batches",
    "contact_sheet",
    "draw_from_rows",
    "encode_pairs",
    "find_negatives",
]
