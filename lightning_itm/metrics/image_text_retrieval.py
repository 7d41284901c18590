"""Image-text retrieval over a whole set, as a torchmetrics metric."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.functional.retrieval import recall_at_k, retrieval_rank


class ImageTextRetrieval(Metric):
    """Recall at K, their sum, median and mean rank of image-to-text and text-to-image retrieval, several texts an image.

    A query is right if one of its own is among the first K; its other own never count against it; a tie counts against the
    model. Recall is in percent, ranks start from 1. Images and texts that arrive twice (the padding of a distributed
    sampler) count once, by id. Nothing of size images × texts exists at once.

    Args:
        recall_at: The K.
        folds: Split the images, in the order of their ids, into as many parts, and average over them: 5 for COCO 1K. Fewer
            images than folds make one part each.
        **kwargs: See :class:`torchmetrics.Metric`.

    Raises:
        ValueError: ``recall_at`` or ``folds`` is not positive; in ``compute``: nothing was seen, or an id stands for two
            different images or texts.

    Example:
        >>> metric = ImageTextRetrieval(recall_at=(1,))
        >>> metric.update(EmbeddingPairs(torch.eye(2), torch.eye(2), torch.arange(2), torch.arange(2)))
        >>> {name: value.item() for name, value in metric.compute().items() if "r1" in name or name == "rsum"}
        {'i2t_r1': 100.0, 't2i_r1': 100.0, 'rsum': 200.0}

    References:
        Karpathy and Fei-Fei, CVPR 2015, for the protocol and the five folds.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    image: list[Tensor]
    text: list[Tensor]
    image_id: list[Tensor]
    text_id: list[Tensor]

    def __init__(self, recall_at: Sequence[int] = (1, 5, 10), folds: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not recall_at or min(recall_at) < 1:
            raise ValueError(f"Expected `recall_at` to hold positive integers, got {tuple(recall_at)}.")
        if folds is not None and folds < 1:
            raise ValueError(f"Expected `folds` to be a positive integer or None, got {folds}.")
        self.recall_at, self.folds = tuple(recall_at), folds
        for name in ("image", "text", "image_id", "text_id"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, pairs: EmbeddingPairs) -> None:
        """Take in a batch of pairs."""
        self.image.append(pairs.image_embeddings.detach())
        self.text.append(pairs.text_embeddings.detach())
        self.image_id.append(pairs.image_id)
        self.text_id.append(pairs.text_id)

    def compute(self) -> dict[str, Tensor]:
        """Return ``i2t_r1`` … ``t2i_r10``, ``rsum``, and ``median_rank`` and ``mean_rank`` of either direction."""
        if len(self.image) == 0:  # a list of batches, or after a gather one tensor
            raise ValueError("Expected at least one batch before `compute`, got none. Call `update` first.")
        rows_id, text_id = dim_zero_cat(self.image_id), dim_zero_cat(self.text_id)
        image, image_id, _, _ = _first_of_each("image_id", dim_zero_cat(self.image), rows_id)
        text, _, row, group = _first_of_each("text_id", dim_zero_cat(self.text), text_id)
        text_image_id = rows_id[row]
        if bool((other := text_image_id[group] != rows_id).any()):
            raise ValueError(
                f"Expected every text to belong to one image, got two for text_id {int(text_id[other][0])}. "
                "Number equal texts of different images separately."
            )
        values = [
            self._of_part(image[part], image_id[part], text, text_image_id)
            for part in torch.arange(len(image_id), device=image_id.device).tensor_split(
                min(self.folds or 1, len(image_id))
            )
        ]
        return {name: torch.stack([value[name] for value in values]).mean() for name in values[0]}

    def plot(self, val: dict[str, Tensor] | None = None, ax: Any = None) -> tuple[Any, Any]:
        """Draw recall at K of both directions as bars.

        Args:
            val: What ``compute`` returned; ``None`` calls it.
            ax: A matplotlib axis; ``None`` makes one.

        Returns:
            Figure and axis.
        """
        import matplotlib.pyplot as plt

        values = self.compute() if val is None else val
        ax = plt.subplots()[1] if ax is None else ax
        for offset, direction, label in ((-0.2, "i2t", "image to text"), (0.2, "t2i", "text to image")):
            heights = [float(values[f"{direction}_r{k}"]) for k in self.recall_at]
            bars = ax.bar([place + offset for place in range(len(heights))], heights, width=0.38, label=label)
            ax.bar_label(bars, fmt="%.1f", padding=2)
        ax.set_xticks(range(len(self.recall_at)), [f"R@{k}" for k in self.recall_at])
        ax.set(ylim=(0, 110), ylabel="recall (%)", title=f"rsum {float(values['rsum']):.1f}")
        ax.legend(loc="upper left", frameon=False)
        return ax.figure, ax

    def _of_part(self, image: Tensor, image_id: Tensor, text: Tensor, text_image_id: Tensor) -> dict[str, Tensor]:
        own = torch.isin(text_image_id, image_id)
        text, text_image_id = text[own], text_image_id[own]
        ranks = {
            "i2t": retrieval_rank(image, text, query_id=image_id, key_id=text_image_id),
            "t2i": retrieval_rank(text, image, query_id=text_image_id, key_id=image_id),
        }
        recalls = {f"{way}_r{k}": recall_at_k(rank, k) for way, rank in ranks.items() for k in self.recall_at}
        medians = {f"{way}_median_rank": 1 + rank.float().quantile(0.5) for way, rank in ranks.items()}
        means = {f"{way}_mean_rank": 1 + rank.float().mean() for way, rank in ranks.items()}
        return {**recalls, "rsum": torch.stack(list(recalls.values())).sum(), **medians, **means}


def _first_of_each(name: str, embeddings: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the first row of each id, in the order of the ids, the ids, where each stood, and the place of every row's id."""
    unique, group = ids.unique(return_inverse=True)
    row = torch.full_like(unique, len(ids)).scatter_reduce(0, group, torch.arange(len(ids), device=ids.device), "amin")
    first = embeddings[row]
    again = (row[group] != torch.arange(len(ids), device=ids.device)).nonzero().squeeze(1)
    cosine = torch.nn.functional.cosine_similarity(embeddings[again].float(), first[group[again]].float(), dim=1)
    cosine = cosine.masked_fill((embeddings[again] == first[group[again]]).all(dim=1), 1)  # zeros have no direction
    if bool((cosine < _SAME).any()):
        bad = int(ids[again[cosine.argmin()]])
        raise ValueError(
            f"Expected one embedding for each `{name}`, got two that differ (cosine {float(cosine.min()):.2f}) for {name} "
            f"{bad}. Give every image and every text a number of its own; a repeated number is counted once."
        )
    return first, unique, row, group


_SAME = 0.9  # the same input twice, in bfloat16 and in another batch, is above 0.99
