"""How good a model is: retrieval over a whole set, and zero-shot classification."""

from lightning_itm.metrics.compositional import CompositionalAccuracy
from lightning_itm.metrics.image_text_retrieval import ImageTextRetrieval
from lightning_itm.metrics.ranked_ids import RankedIds, coco_ranking, ranked_ids
from lightning_itm.metrics.zero_shot import TEMPLATES, zero_shot_accuracy

__all__ = [
    "TEMPLATES",
    "CompositionalAccuracy",
    "ImageTextRetrieval",
    "RankedIds",
    "coco_ranking",
    "ranked_ids",
    "zero_shot_accuracy",
]
