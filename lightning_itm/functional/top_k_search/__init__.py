"""The exact search for the most similar keys of each anchor, in chunks, with a fast way on CUDA."""

from lightning_itm.functional.top_k_search.candidates import TopK
from lightning_itm.functional.top_k_search.grouped import group_keys, group_maxima
from lightning_itm.functional.top_k_search.top_k import score_ceiling, top_k_negatives

__all__ = ["TopK", "group_keys", "group_maxima", "score_ceiling", "top_k_negatives"]
