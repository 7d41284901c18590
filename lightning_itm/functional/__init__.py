"""The mathematics: tensors in, tensors out, with PyTorch alone."""

from lightning_itm.functional.contrastive import (
    drop_likely_matches,
    emphasize_hard,
    info_nce_cost,
    sigmoid_cost,
)
from lightning_itm.functional.false_negatives import (
    DrawnNegative,
    SimilarityFit,
    draw_negative,
    false_negative_posterior,
    sampling_weights,
)
from lightning_itm.functional.posterior import histogram_posterior
from lightning_itm.functional.quintuplet import OfflineScores, quintuplet_cost
from lightning_itm.functional.retrieval import recall_at_k, retrieval_rank
from lightning_itm.functional.similarity import (
    DirectionScores,
    direction_scores,
    hardest_negative,
    negative_mask,
    unit_norm,
)
from lightning_itm.functional.top_k_search.candidates import TopK
from lightning_itm.functional.top_k_search.top_k import top_k_negatives
from lightning_itm.functional.triplet import hardest_cost, mean_cost, selective_cost

__all__ = [
    "DirectionScores",
    "DrawnNegative",
    "OfflineScores",
    "SimilarityFit",
    "TopK",
    "direction_scores",
    "draw_negative",
    "drop_likely_matches",
    "emphasize_hard",
    "false_negative_posterior",
    "hardest_cost",
    "hardest_negative",
    "histogram_posterior",
    "info_nce_cost",
    "mean_cost",
    "negative_mask",
    "quintuplet_cost",
    "recall_at_k",
    "retrieval_rank",
    "sampling_weights",
    "selective_cost",
    "sigmoid_cost",
    "top_k_negatives",
    "unit_norm",
]
