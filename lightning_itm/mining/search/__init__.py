"""The search for the hardest negatives of a whole set."""

from lightning_itm.mining.search.split import search_split_pairs
from lightning_itm.mining.search.table import fill_table, find_split_negatives
from lightning_itm.mining.search.whole import MinedNegatives, find_negatives, padded_rows

__all__ = [
    "MinedNegatives",
    "fill_table",
    "find_negatives",
    "find_split_negatives",
    "padded_rows",
    "search_split_pairs",
]
