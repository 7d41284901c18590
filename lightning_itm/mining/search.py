"""The hardest negatives among the embeddings of a whole set."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm.auto import tqdm

from lightning_itm.distributed import gather
from lightning_itm.functional import TopK, top_k_negatives
from lightning_itm.functional.top_k import score_ceiling
from lightning_itm.mining.encode import EncodedPairs

NUM_SAMPLED_ANCHORS = 256
ANCHORS_AT_ONCE = 16_384  # between two ticks of the progress bar


@dataclass
class FoundNegatives:
    """What a search found: rows of texts for each image, of images for each text, and how hard they are."""

    texts: Tensor
    images: Tensor
    text_scores: Tensor
    image_scores: Tensor
    gap: float
    rejected_share: float


def find_negatives(
    pairs: EncodedPairs,
    texts_per_image: int,
    images_per_text: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    is_shown: bool = False,
    **guards: Any,
) -> FoundNegatives:
    """Search the hardest texts of every image and the hardest images of every text, each rank its share of the anchors.

    Args:
        pairs: All embeddings.
        texts_per_image: Texts kept for an image.
        images_per_text: Images kept for a text.
        rank: This rank.
        world_size: Number of ranks.
        is_shown: Draw a progress bar.
        **guards: Of :func:`~lightning_itm.functional.top_k_negatives`.
    """
    image_id = torch.arange(len(pairs.image), device=pairs.image.device)
    of_image, of_text = pairs.positive()
    split = {"rank": rank, "world_size": world_size, "is_shown": is_shown, **guards}
    texts, rejected_texts = _search(
        pairs.image, pairs.text, pairs.text_is_valid, image_id, pairs.text_image_id, of_image, texts_per_image, **split
    )
    images, rejected_images = _search(
        pairs.text, pairs.image, pairs.image_is_valid, pairs.text_image_id, image_id, of_text, images_per_text, **split
    )
    gap = torch.cat([of_image - texts.scores[:, 0], of_text - images.scores[:, 0]])
    gap = gap[gap.isfinite()]
    rejected = (rejected_texts + rejected_images) / 2
    return FoundNegatives(texts.index, images.index, texts.scores, images.scores, float(gap.mean()), rejected)


def _search(
    anchors: Tensor,
    keys: Tensor,
    key_is_valid: Tensor,
    anchor_id: Tensor,
    key_id: Tensor,
    positive: Tensor,
    k: int,
    *,
    rank: int,
    world_size: int,
    is_shown: bool,
    **guards: Any,
) -> tuple[TopK, float]:
    kept = key_is_valid.nonzero().squeeze(1)
    keys, key_id = keys[kept], key_id[kept]
    share = -(-len(anchors) // world_size)
    mine = (torch.arange(share, device=anchors.device) + rank * share).clamp_max(len(anchors) - 1)
    found = [
        top_k_negatives(
            anchors[rows], keys, k, anchor_id=anchor_id[rows], key_id=key_id, positive=positive[rows], **guards
        )
        for rows in tqdm(mine.split(ANCHORS_AT_ONCE), "Mining: search", leave=False, disable=not is_shown)
    ]
    scores, index = (gather(torch.cat(parts))[: len(anchors)] for parts in zip(*found, strict=True))
    index = torch.where(index < 0, -1, kept[index.clamp_min(0)])
    return TopK(scores, index), _rejected_share(anchors, keys, anchor_id, key_id, positive, k, **guards)


def _rejected_share(
    anchors: Tensor, keys: Tensor, anchor_id: Tensor, key_id: Tensor, positive: Tensor, k: int, **guards: Any
) -> float:
    """Measure, on some anchors, the share of the hardest ``k`` that the guards reject."""
    rank_min = guards.pop("rank_min", 0)
    some = slice(None, None, max(1, len(anchors) // NUM_SAMPLED_ANCHORS))
    ceiling = score_ceiling(positive[some], **guards)
    if ceiling is None and rank_min == 0:
        return 0.0
    free = top_k_negatives(anchors[some], keys, k, anchor_id=anchor_id[some], key_id=key_id).scores
    there = free.isfinite()
    rejected = torch.zeros_like(there) if ceiling is None else free > ceiling.expand(len(free))[:, None]
    skipped = (there & ~rejected).sum(dim=1).clamp_max(rank_min)
    return float(((rejected & there).sum() + skipped.sum()) / there.sum().clamp_min(1))


def padded_rows(index: Tensor, rows: int) -> Tensor:
    """Return int32 on the CPU, with rows of −1 for anchors that were not searched."""
    return pad(index.int().cpu(), (0, 0, 0, rows - len(index)), value=-1)
