"""Search the hardest negatives among the embeddings of a whole set."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.functional import pad
from tqdm.auto import tqdm

from lightning_itm.checks import check_choice
from lightning_itm.distributed import gather
from lightning_itm.functional import TopK, top_k_negatives
from lightning_itm.functional.top_k_search.top_k import score_ceiling
from lightning_itm.mining.encoded import EncodedPairs
from lightning_itm.mining.search.approximate import IndexedKeys, sampled_valid, shared_fraction

NUM_SAMPLED_ANCHORS = 256
ANCHORS_AT_ONCE = 16_384  # between two ticks of the progress bar
LEAST_RECALL = 0.8  # below it, a warning says what to do


@dataclass
class MinedNegatives:
    """Hold what a search gave: the hardest negatives of every image and every text, and how hard they are.

    Args:
        texts: int64 `(images, texts_per_image)`, ids of the hardest texts of each image. −1 stands where there is none.
        images: int64 `(texts, images_per_text)`, ids of the hardest images of each text. −1 stands where there is none.
        text_scores: Cosine similarities of ``texts`` and their image, −inf where there is none.
        image_scores: Cosine similarities of ``images`` and their text, −inf where there is none.
        gap: Mean similarity of the matching pairs minus that of the hardest negatives. Below 0, negatives win.
        rejected_fraction: Fraction of the hardest candidates that a guard left out, in [0, 1].
        recall: Fraction of what the exact search mines that was mined, in [0, 1], measured on up to 1,000 anchors of each
            side, with the guards. 1 with the exact search.
    """

    texts: Tensor
    images: Tensor
    text_scores: Tensor
    image_scores: Tensor
    gap: float
    rejected_fraction: float
    recall: float = 1.0


def find_negatives(
    pairs: EncodedPairs,
    texts_per_image: int,
    images_per_text: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    is_shown: bool = False,
    search: Literal["exact", "faiss"] = "exact",
    faiss_index: str | None = None,
    **guards: Any,
) -> MinedNegatives:
    """Search the hardest texts of every image and the hardest images of every text. Each rank searches for a part of them.

    A text that equals one of the captions of an image is none of its negatives, and the image none of the text's.

    Args:
        pairs: The embeddings of the whole set, the same on every rank.
        texts_per_image: Most texts that are kept per image, such as 300.
        images_per_text: Most images that are kept per text, such as 60.
        rank: The number of this process, from 0.
        world_size: The number of processes that search together.
        is_shown: Draw a progress bar.
        search: ``"exact"``, or ``"faiss"``: only the keys that an index of FAISS finds are compared, exactly.
        faiss_index: The index, as :class:`~lightning_itm.OfflineHardNegativeMining` takes it.
        **guards: ``rank_min``, ``max_score``, ``absolute_margin`` and ``relative_margin``, as
            :func:`~lightning_itm.functional.top_k_negatives` takes them. They leave out likely false negatives.

    Example:
        >>> import torch
        >>> from lightning_itm.mining import EncodedPairs, find_negatives
        >>> eye, ids, valid = torch.eye(3), torch.arange(3), torch.ones(3, dtype=torch.bool)
        >>> texts = torch.nn.functional.normalize(eye + 0.5 * eye.roll(1, 0))  # each a little like the image before it
        >>> find_negatives(EncodedPairs(eye, texts, ids, valid, valid), 1, 1).texts
        tensor([[1],
                [2],
                [0]])
    """
    of_image, of_text = pairs.positive()
    image_id, (image_captions, text_captions) = torch.arange(len(of_image), device=of_image.device), pairs.captions()
    images = _Side(pairs.image_embeddings, pairs.image_is_valid, image_id, image_captions)
    texts = _Side(pairs.text_embeddings, pairs.text_is_valid, pairs.text_image_id, text_captions)
    check_choice("search", search, ("exact", "faiss"))
    indexing = {"is_indexed": search == "faiss", "faiss_index": faiss_index}
    split = {"rank": rank, "world_size": world_size, "is_shown": is_shown, **indexing, **guards}
    mined_texts, *of_texts = _search(images, texts, of_image, texts_per_image, **split)
    mined_images, *of_images = _search(texts, images, of_text, images_per_text, **split)
    # What can't be read, or was not seen yet, has an embedding that says nothing.
    mined_texts, mined_images = _of(mined_texts, pairs.image_is_valid), _of(mined_images, pairs.text_is_valid)
    gap = mean_gap(of_image - mined_texts.scores[:, 0], of_text - mined_images.scores[:, 0])  # column 0 has the hardest
    rejected, recall = ((one + other) / 2 for one, other in zip(of_texts, of_images, strict=True))
    measured = gap, rejected, recall
    if recall < LEAST_RECALL:
        rank_zero_warn(
            f"The index found {recall:.0%} of what the exact search mines, with `faiss_index={faiss_index!r}`. Let it look "
            "into more lists, such as 'IVF4096,Flat nprobe=512', name an index that rounds less, or use `search='exact'`."
        )
    return MinedNegatives(mined_texts.index, mined_images.index, mined_texts.scores, mined_images.scores, *measured)


class _Side(NamedTuple):
    """All images, or all texts, of a set."""

    embeddings: Tensor
    is_valid: Tensor
    image_id: Tensor
    captions: Tensor | None
    """`(rows, captions of a row)`, filled up with −1."""

    def of(self, rows: Tensor | slice) -> "_Side":
        return _Side(*(None if part is None else part[rows] for part in self))  # type: ignore[arg-type]


def _search(
    anchors: _Side,
    keys: _Side,
    positive: Tensor,
    k: int,
    *,
    rank: int,
    world_size: int,
    is_shown: bool,
    is_indexed: bool,
    faiss_index: str | None,
    **guards: Any,
) -> tuple[TopK, float, float]:
    kept = keys.is_valid.nonzero().squeeze(1)  # what can't be read is left out
    keys, num_anchors = keys.of(kept), len(positive)
    indexed = IndexedKeys(keys.embeddings, faiss_index) if is_indexed else None
    own_rows = _own_rows(torch.arange(num_anchors, device=kept.device), rank, world_size)
    parts = [
        _top_k(anchors.of(rows), keys, k, indexed, positive=positive[rows], **guards)
        for rows in tqdm(own_rows.split(ANCHORS_AT_ONCE), "Mining: search", leave=False, disable=not is_shown)
    ]
    # Own rows are consecutive, so the gathered rows are in the order of the anchors, and the repeated ones are at the end.
    scores, index = (gather(torch.cat(part))[:num_anchors] for part in zip(*parts, strict=True))
    recall = 1.0
    if is_indexed:
        some = sampled_valid(anchors.is_valid)
        own = _own_rows(some, rank, world_size)
        exact = _top_k(anchors.of(own), keys, k, positive=positive[own], **guards)
        recall = shared_fraction(index[some], gather(exact.index)[: len(some)])
    if len(kept):
        index = torch.where(index < 0, -1, kept[index.clamp_min(0)])  # (anchors, k), ids of the whole set again
    return TopK(scores, index), _rejected_fraction(anchors, keys, positive, k, **guards), recall


def _own_rows(rows: Tensor, rank: int, world_size: int) -> Tensor:
    """Return the part of a rank, as many rows on every rank, so that the last row may come several times."""
    num_own = -(-len(rows) // world_size)
    return rows[(torch.arange(num_own, device=rows.device) + rank * num_own).clamp_max(len(rows) - 1)]


def _top_k(anchors: _Side, keys: _Side, k: int, indexed: IndexedKeys | None = None, **options: Any) -> TopK:
    options |= {"anchor_id": anchors.image_id, "key_id": keys.image_id}
    options |= {"anchor_captions": anchors.captions, "key_captions": keys.captions}
    if indexed is not None:
        return indexed.top_k_negatives(anchors.embeddings, k, **options)
    return top_k_negatives(anchors.embeddings, keys.embeddings, k, **options)


def _of(mined: TopK, anchor_is_valid: Tensor) -> TopK:
    """Leave rows empty for anchors that are not valid."""
    scores = mined.scores.masked_fill(~anchor_is_valid[:, None], -torch.inf)  # (anchors, k)
    return TopK(scores, mined.index.masked_fill(~anchor_is_valid[:, None], -1))


def _rejected_fraction(anchors: _Side, keys: _Side, positive: Tensor, k: int, **guards: Any) -> float:
    """Measure on some anchors which fraction of the hardest ``k`` the guards reject."""
    some = sampled_anchors(len(positive))
    if not has_guards(**guards):
        return 0.0
    return rejected_by_guards(_top_k(anchors.of(some), keys, k).scores, positive[some], **guards)


def sampled_anchors(num_anchors: int) -> slice:
    """Return some anchors, spread over all, on which it is measured what guards reject."""
    return slice(None, None, max(1, num_anchors // NUM_SAMPLED_ANCHORS))


def has_guards(rank_min: int = 0, **limits: float | None) -> bool:
    """Return whether a guard is given that can reject something."""
    return rank_min > 0 or any(limit is not None for limit in limits.values())


def rejected_by_guards(free: Tensor, positive: Tensor, rank_min: int = 0, **limits: float | None) -> float:
    """Return which fraction of the hardest negatives the guards reject.

    Args:
        free: Similarities of the hardest negatives that are found without guards, `(anchors, k)`, −inf where there is none.
        positive: Similarity of each anchor and its positive, `(anchors,)`.
        rank_min: How many the guard of this name leaves out.
        **limits: The other guards.
    """
    ceiling, is_there = score_ceiling(positive, **limits), free.isfinite()
    is_rejected = torch.zeros_like(is_there) if ceiling is None else free > ceiling.expand(len(free))[:, None]
    # `rank_min` skips among those that the other guards let pass.
    skipped = (is_there & ~is_rejected).sum(dim=1).clamp_max(rank_min)
    return float(((is_rejected & is_there).sum() + skipped.sum()) / is_there.sum().clamp_min(1))


def mean_gap(*gaps: Tensor) -> float:
    """Return the mean over the anchors that have one. An anchor without a negative has the score −inf, and no gap."""
    gap = torch.cat(gaps)
    return float(gap[gap.isfinite()].mean())


def padded_rows(index: Tensor, num_rows: int) -> Tensor:
    """Return int32 on the CPU, with rows of −1 for anchors that were not searched.

    Args:
        index: Integers `(anchors, k)`, for the first anchors of a set.
        num_rows: Number of rows of the result, at least as many as there are anchors.
    """
    return pad(index.int().cpu(), (0, 0, 0, num_rows - len(index)), value=-1)
