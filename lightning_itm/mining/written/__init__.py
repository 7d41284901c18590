"""Negatives that were mined before, with any model, and written to files."""

from lightning_itm.mining.written.rows import read_negatives
from lightning_itm.mining.written.training import WrittenMining, check_table, make_mining

__all__ = ["WrittenMining", "check_table", "make_mining", "read_negatives"]
