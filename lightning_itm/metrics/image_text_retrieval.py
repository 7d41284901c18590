"""Image-text retrieval over a whole set, as a torchmetrics metric."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_itm.captions import captions_of_images
from lightning_itm.checks import check_choice
from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.functional.retrieval import recall_at_k, retrieval_rank, retrieval_ranks
from lightning_itm.metrics.whole_set import whole_set

_PARTS = ("image_embeddings", "text_embeddings", "image_id", "text_id")
_Side = tuple[Tensor, Tensor, Tensor | None]  # embeddings, the ids of their images, and captions if they are compared


class ImageTextRetrieval(Metric):
    """Measure how well images find their texts, and texts their images, over a whole set.

    In plain terms: every image is compared with all texts, and every text with all images.

    1. *Recall at K* (``i2t_r1``, ``t2i_r10``, ...) is the percentage of queries that have a match among their K most similar
       results. ``rsum`` is the sum of all recalls, at most 600 with three K.
    2. *Ranks* (``i2t_median_rank``, ``t2i_mean_rank``, ...) tell where the first match stands. The best rank is 1.

    An image may have several texts, as in COCO and Flickr30K. One of them among the first K is enough, and the others never
    count as wrong results. A tie counts against the model, so a collapsed model scores 0. An image or a text that arrives
    twice counts once, by its id: a distributed sampler repeats pairs. Only a block of the similarities is in memory at a time.

    Higher is better for recalls and ``rsum``, lower for ranks. ``higher_is_better`` of torchmetrics has one value for all, so
    it is None here, and :attr:`higher_is_better_by_name` says it for each value. A ``MetricTracker`` therefore asks for
    ``maximize``: ``MetricTracker(MetricCollection([metric]), maximize=True)`` finds the best recalls, False the best ranks.

    Args:
        recall_at: The values of K, positive integers. The default, 1, 5 and 10, is what papers report.
        folds: Split the images, in the order of their ids, into this many parts, and report the mean over the parts. Use 5 for
            the "COCO 1K" protocol. If there are fewer images than folds, each image is one part. Default: no parts.
        equal_captions: What a text is that equals a caption of the image, but belongs to another image. ``"wrong"``, as in
            papers. Then a perfect model can have R@1 of 0. ``"right"``: a match of the image, and the image one of the text.
            It needs pairs with a ``caption_id``, which a set with such captions gives.
        **kwargs: Options that every torchmetrics metric has, such as ``sync_on_compute``. They are passed on to
            :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if ``recall_at`` or ``folds`` is not positive, or ``equal_captions`` is unknown. ``compute`` raises it
            if nothing was seen, or if one id stands for two different images or texts, or if an embedding is not finite.

    Example:
        >>> import torch
        >>> from lightning_itm import ImageTextRetrieval
        >>> metric = ImageTextRetrieval(recall_at=(1,))
        >>> metric.update(torch.eye(2), torch.eye(2), image_id=torch.arange(2), text_id=torch.arange(2))
        >>> {name: value.item() for name, value in metric.compute().items() if "r1" in name or name == "rsum"}
        {'i2t_r1': 100.0, 't2i_r1': 100.0, 'rsum': 200.0}

    References:
        Karpathy and Fei-Fei, CVPR 2015, for the protocol and the five folds.
    """

    is_differentiable = False
    higher_is_better = None  # recalls rise and ranks fall as a model gets better: one value would be wrong for some
    full_state_update = False
    image_embeddings: list[Tensor]
    text_embeddings: list[Tensor]
    image_id: list[Tensor]
    text_id: list[Tensor]
    caption_id: list[Tensor]

    def __init__(
        self,
        recall_at: Sequence[int] = (1, 5, 10),
        folds: int | None = None,
        *,
        equal_captions: Literal["wrong", "right"] = "wrong",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choice("equal_captions", equal_captions, ("wrong", "right"))
        if not recall_at or min(recall_at) < 1:
            raise ValueError(f"Expected `recall_at` to hold positive integers, got {tuple(recall_at)}.")
        if folds is not None and folds < 1:
            raise ValueError(f"Expected `folds` to be a positive integer or None, got {folds}.")
        self.recall_at, self.folds, self.equal_captions = tuple(recall_at), folds, equal_captions
        for name in (*_PARTS, "caption_id"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    @property
    def higher_is_better_by_name(self) -> dict[str, bool]:
        """Tell for each value of :meth:`compute` whether higher is better: True for recalls and ``rsum``, False for ranks."""
        recalls = {f"{direction}_r{k}": True for direction in ("i2t", "t2i") for k in self.recall_at}
        ranks = {f"{direction}_{kind}_rank": False for kind in ("median", "mean") for direction in ("i2t", "t2i")}
        return {**recalls, "rsum": True, **ranks}

    def update(
        self,
        image_embeddings: EmbeddingPairs | Tensor,
        text_embeddings: Tensor | None = None,
        image_id: Tensor | None = None,
        text_id: Tensor | None = None,
        caption_id: Tensor | None = None,
    ) -> None:
        """Take in a batch of pairs: ``update(pairs)``, or ``update(image_embeddings, text_embeddings, image_id, text_id)``.

        Args:
            image_embeddings: The embeddings of the images, `(pairs, dim)`, with norm 1: they are compared by dot products. Or
                an :class:`~lightning_itm.embeddings.EmbeddingPairs` that holds all.
            text_embeddings: The embeddings of the texts, `(pairs, dim)`, row by row the match of the images.
            image_id: The image each row belongs to, int64 `(pairs,)`. Texts of one image share its id.
            text_id: The text of each row, int64 `(pairs,)`.
            caption_id: The number of the caption of each row, int64 `(pairs,)`. Default: no caption equals another.

        Raises:
            TypeError: if the ids are not integers, or if some of the four tensors are missing, or if there are tensors beside
                an ``EmbeddingPairs``.
            ValueError: if the shapes do not match.
        """
        others = {"text_embeddings": text_embeddings, "image_id": image_id, "text_id": text_id}
        pairs = _as_pairs(image_embeddings, {**others, "caption_id": caption_id})
        # Without the graph: a metric that is fed in training would keep the activations of every batch.
        for name in _PARTS:
            getattr(self, name).append(getattr(pairs, name).detach())
        self.caption_id.append(pairs.known_captions())

    def compute(self) -> dict[str, Tensor]:
        """Return ``i2t_r1`` … ``t2i_r10`` and ``rsum`` in percent, and the median and mean ranks of both directions."""
        if len(self.image_embeddings) == 0:  # a list of batches, or after a gather one tensor
            raise ValueError("Expected at least one batch before `compute`, got none. Call `update` first.")
        seen = whole_set(*(dim_zero_cat(getattr(self, name)) for name in _PARTS))
        image, image_id, text, text_image_id = (
            seen.image_embeddings,
            seen.image_id,
            seen.text_embeddings,
            seen.text_image_id,
        )
        images: _Side = image, image_id, None
        texts: _Side = text, text_image_id, None
        if self.equal_captions == "right":
            caption_id = dim_zero_cat(self.caption_id)[seen.text_row]
            owner = torch.searchsorted(image_id, text_image_id)  # (texts,): the row of the image
            images = image, image_id, captions_of_images(caption_id, owner, len(image_id))  # (images, most)
            texts = text, text_image_id, caption_id[:, None]  # (texts, 1)
        # At most one part per image: a part without a query has no recall.
        num_parts = min(self.folds or 1, len(image_id))
        parts = torch.arange(len(image_id), device=image_id.device).tensor_split(num_parts)
        values = [self._of_part(part, images, texts) for part in parts]
        return {name: torch.stack([value[name] for value in values]).mean() for name in values[0]}

    def plot(self, val: dict[str, Tensor] | None = None, ax: Any = None) -> tuple[Any, Any]:
        """Draw recall at K of both directions as bars.

        Args:
            val: What ``compute`` returned. Default: call it.
            ax: The matplotlib axis to draw on. Default: make one.

        Returns:
            Figure and axis.
        """
        import matplotlib.pyplot as plt  # here, because a training run needs no figure and matplotlib is slow to import

        values = self.compute() if val is None else val
        ax = plt.subplots()[1] if ax is None else ax
        for offset, direction, label in ((-0.2, "i2t", "image to text"), (0.2, "t2i", "text to image")):
            heights = [float(values[f"{direction}_r{k}"]) for k in self.recall_at]
            bars = ax.bar([index + offset for index in range(len(heights))], heights, width=0.38, label=label)
            ax.bar_label(bars, fmt="%.1f", padding=2)
        ax.set_xticks(range(len(self.recall_at)), [f"R@{k}" for k in self.recall_at])
        ax.set(ylim=(0, 110), ylabel="recall (%)", title=f"rsum {float(values['rsum']):.1f}")
        ax.legend(loc="upper left", frameon=False)
        return ax.figure, ax

    def _of_part(self, part: Tensor, images: _Side, texts: _Side) -> dict[str, Tensor]:
        # A part has its own images, and the texts of these alone: texts of other parts are no distractors.
        own = torch.isin(texts[1], images[1][part])
        image, text = (
            (values[rows], ids[rows], None if captions is None else captions[rows])
            for (values, ids, captions), rows in ((images, part), (texts, own))
        )
        ranks = _ranks(image, text)
        recalls = {f"{way}_r{k}": recall_at_k(rank, k) for way, rank in ranks.items() for k in self.recall_at}
        medians = {f"{way}_median_rank": 1 + rank.float().quantile(0.5) for way, rank in ranks.items()}
        means = {f"{way}_mean_rank": 1 + rank.float().mean() for way, rank in ranks.items()}
        return {**recalls, "rsum": torch.stack(list(recalls.values())).sum(), **medians, **means}


def _ranks(image: _Side, text: _Side) -> dict[str, Tensor]:
    # One rank per query, from 0.
    if image[2] is None:
        i2t, t2i = retrieval_ranks(image[0], text[0], query_id=image[1], key_id=text[1])
        return {"i2t": i2t, "t2i": t2i}
    return {
        way: retrieval_rank(q, k, query_id=q_id, key_id=k_id, query_captions=q_captions, key_captions=k_captions)
        for way, (q, q_id, q_captions), (k, k_id, k_captions) in (("i2t", image, text), ("t2i", text, image))
    }


def _as_pairs(first: EmbeddingPairs | Tensor, others: dict[str, Tensor | None]) -> EmbeddingPairs:
    given = {name: value for name, value in others.items() if value is not None}
    if isinstance(first, EmbeddingPairs):
        if given:
            raise TypeError(
                f"Expected an EmbeddingPairs alone, got {', '.join(given)} beside it. Pass it, or four tensors."
            )
        return first
    if not isinstance(first, Tensor):
        raise TypeError(
            f"Expected `image_embeddings` to be a tensor or an EmbeddingPairs, got {type(first).__name__}. "
            "Call `update(pairs)`, or `update(image_embeddings, text_embeddings, image_id, text_id)`."
        )
    if missing := [name for name in others if name not in given and name != "caption_id"]:
        raise TypeError(
            f"Expected four tensors, got `image_embeddings` without {', '.join(missing)}. "
            "Call `update(image_embeddings, text_embeddings, image_id, text_id)`."
        )
    return EmbeddingPairs(first, **given)
