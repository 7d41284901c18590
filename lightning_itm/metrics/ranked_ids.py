"""What a query finds, by name: the ids of the nearest texts of each image, and of the nearest images of each text."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.metrics.image_text_retrieval import ImageTextRetrieval
from lightning_itm.metrics.whole_set import whole_set

Ranking = dict[int, list[int]]
CHUNK = 1 << 22  # scores at once


class RankedIds(NamedTuple):
    """Hold the nearest texts of each image and the nearest images of each text, the nearest first."""

    image_id: Tensor
    """int64 `(images,)`, the images that ask."""
    texts: Tensor
    """int64 `(images, k)`, ids of the nearest texts of each image. Narrower than k where there are fewer texts."""
    text_id: Tensor
    """int64 `(texts,)`, the texts that ask."""
    images: Tensor
    """int64 `(texts, k)`, ids of the nearest images of each text. Narrower than k where there are fewer images."""


def ranked_ids(pairs: EmbeddingPairs | ImageTextRetrieval, k: int = 10) -> RankedIds:
    """Rank the texts for every image, and the images for every text, over a whole set.

    Use it to look at what a model finds, or to hand the ranking to another evaluation (:func:`coco_ranking`). It is a function
    beside the metric, because ``compute`` keeps its result, and a ranking is large: `(images + texts, k)` numbers.

    As in the metric, a tie counts against the model: of equal scores, wrong ones come first. So recall at K of this ranking is
    that of :class:`~lightning_itm.ImageTextRetrieval`.

    Args:
        pairs: The pairs of the whole set, as ``DualEncoder.embed`` returns them, or a metric that has seen them.
        k: How many are kept. 10 is enough for recall at 10. See :func:`coco_ranking` for what COCO's evaluations need.

    Returns:
        Ids on the CPU.

    Raises:
        TypeError: if ``pairs`` is neither of the two.
        ValueError: if ``k`` is not positive, if nothing was seen, or if embeddings are not finite or ids do not fit together.

    Example:
        >>> import torch
        >>> from lightning_itm.embeddings import EmbeddingPairs
        >>> from lightning_itm.metrics import ranked_ids
        >>> texts = torch.tensor([[0.8, 0.6], [0.6, 0.8]])
        >>> ranked_ids(EmbeddingPairs(torch.eye(2), texts, torch.tensor([3, 5]), torch.tensor([7, 9])), k=1).texts
        tensor([[7],
                [9]])
    """
    if k < 1:
        raise ValueError(f"Expected `k` to be a positive integer, got {k}.")
    seen = whole_set(*_parts(pairs))
    images = seen.image_embeddings, seen.image_id, seen.image_id
    texts = seen.text_embeddings, seen.text_image_id, seen.text_id
    return RankedIds(seen.image_id.cpu(), _nearest(images, texts, k), seen.text_id.cpu(), _nearest(texts, images, k))


def coco_ranking(
    ranked: RankedIds, image_ids: Tensor | Sequence[int] | None, caption_ids: Tensor | Sequence[int] | None
) -> tuple[Ranking, Ranking]:
    """Write a ranking in COCO's own ids, as the package ``eccv_caption`` takes it.

    It evaluates COCO 1K and 5K, CxC (Crisscrossed Captions) and ECCV Caption (mAP@R), whose further matches count as right.
    It comes with ``pip install "lightning_itm[eccv]"``, with its annotations::

        test = ImageTextDataset.from_karpathy("dataset_coco.json", "coco", "test")
        i2t, t2i = coco_ranking(ranked_ids(metric, k=1000), test.coco_image_id, test.coco_caption_id)
        eccv_caption.Metrics().compute_all_metrics(i2t, t2i, ("coco_5k_recalls", "cxc_recalls", "eccv_map_at_r"))

    Recall on COCO 5K and CxC needs the largest K, mAP@R on ECCV needs ``k=48``. COCO 1K looks for the K nearest of a fifth of
    the set within the ranking, so give it ``k=1000``.

    Args:
        ranked: What :func:`ranked_ids` returned.
        image_ids: COCO's id of each image, in the order of our ids: ``dataset.coco_image_id``.
        caption_ids: COCO's id of each text, in the order of our ids: ``dataset.coco_caption_id``.

    Returns:
        ``{image: [captions]}`` and ``{caption: [images]}``, the nearest first.

    Raises:
        ValueError: if the ids are missing, too few, or not unique.

    References:
        Chun et al., *ECCV Caption: Correcting False Negatives by Collecting Machine-and-Human-verified Image-Caption
        Associations for MS-COCO*, ECCV 2022, arXiv 2204.03359.
    """
    of_image = _names("image_ids", image_ids, ranked.image_id, ranked.images)
    of_text = _names("caption_ids", caption_ids, ranked.text_id, ranked.texts)
    i2t = zip(of_image[ranked.image_id].tolist(), of_text[ranked.texts].tolist(), strict=True)
    t2i = zip(of_text[ranked.text_id].tolist(), of_image[ranked.images].tolist(), strict=True)
    return dict(i2t), dict(t2i)


_Side = tuple[Tensor, Tensor, Tensor]  # embeddings, the ids of their images, and their own ids


def _parts(pairs: EmbeddingPairs | ImageTextRetrieval) -> list[Tensor]:
    names = ("image_embeddings", "text_embeddings", "image_id", "text_id")
    if isinstance(pairs, EmbeddingPairs):
        return [getattr(pairs, name).detach() for name in names]
    if not isinstance(pairs, ImageTextRetrieval):
        raise TypeError(
            f"Expected `pairs` to be an EmbeddingPairs or an ImageTextRetrieval, got {type(pairs).__name__}. Call "
            "`metric.update(pairs)` for each batch, and hand in the metric."
        )
    if len(pairs.image_embeddings) == 0:
        raise ValueError("Expected a metric that has seen pairs, got one without. Call `update` first, and no `reset`.")
    with pairs.sync_context():  # the pairs of all processes, where there are several
        return [dim_zero_cat(getattr(pairs, name)) for name in names]


def _nearest(queries: _Side, keys: _Side, k: int) -> Tensor:
    """Return the ids of the nearest keys of each query, `(queries, k)`."""
    (query, query_image, _), (key, key_image, key_id) = queries, keys
    dtype = torch.float32 if query.device.type == "mps" else torch.float64  # as `retrieval_rank`
    key, k, rows = key.to(dtype), min(k, len(key_id)), max(1, CHUNK // len(key))
    found = []
    for part in torch.arange(len(query), device=query.device).split(rows):
        similarity = query[part].to(dtype) @ key.T
        right = query_image[part, None] == key_image
        # Lower by what `retrieval_rank` takes for rounding, so that a wrong key that ties comes before.
        found.append(key_id[(similarity - _ROUNDING * right).topk(k, dim=1).indices].cpu())
    return torch.cat(found)


def _names(argument: str, given: Tensor | Sequence[int] | None, own: Tensor, found: Tensor) -> Tensor:
    if given is None:
        raise ValueError(
            f"Expected `{argument}`, COCO's own ids, got None. `ImageTextDataset.from_karpathy` reads them from "
            "dataset_coco.json ('cocoid' and 'sentid')."
        )
    names, least = torch.as_tensor(given).cpu(), 1 + int(max(own.max(), found.max()))
    if names.ndim != 1 or len(names) < least or names.is_floating_point():
        raise ValueError(
            f"Expected `{argument}` to hold one integer for each of our ids, {least} or more, got {tuple(names.shape)} of "
            f"{names.dtype}. Take those of the set that was ranked."
        )
    if len(names.unique()) < len(names):
        raise ValueError(f"Expected `{argument}` to be unique, got {len(names) - len(names.unique())} of them twice.")
    return names


_ROUNDING = 1e-12
