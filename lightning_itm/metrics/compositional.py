"""How often an image is closer to its caption than to a wrong one, as a torchmetrics metric."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

ROUNDING = 1e-6  # of float32. A bag of words embeds "a dog on a cat" as "a cat on a dog", up to the order of a sum


class CompositionalAccuracy(Metric):
    """Measure how often an image is closer to its caption than to a wrong caption that is nearly the same.

    A tie counts as wrong, so a collapsed model scores 0 and not 100 %, and so does one that reads bags of words where only the
    order of words differs. Differences below 1e-6, the rounding of float32, are ties. Chance is 50 %. An item that arrives
    twice counts once, by its id: a distributed sampler repeats items.

    Args:
        names: The names of the categories. The number in ``category`` is a place in this list. Default: one, ``"all"``.
        **kwargs: Options that every torchmetrics metric has. They are passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if there are no names. ``compute`` raises it if nothing was seen, or if an embedding was not finite.

    Example:
        >>> import torch
        >>> from lightning_itm.metrics import CompositionalAccuracy
        >>> metric, eye = CompositionalAccuracy(), torch.eye(2)
        >>> metric.update(eye, eye, eye.roll(1, 0), item_id=torch.arange(2))
        >>> metric.compute()["accuracy"]
        tensor(100.)

    References:
        Hsieh et al., *SugarCrepe*, NeurIPS 2023, arXiv 2306.14610.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    margin: list[Tensor]
    category: list[Tensor]
    item_id: list[Tensor]

    def __init__(self, names: Sequence[str] = ("all",), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not names:
            raise ValueError("Expected `names` to hold at least one category, got none.")
        self.names = tuple(names)
        for name in ("margin", "category", "item_id"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(
        self,
        image_embeddings: Tensor,
        text_embeddings: Tensor,
        negative_embeddings: Tensor,
        *,
        item_id: Tensor,
        category: Tensor | None = None,
    ) -> None:
        """Take in a batch of items.

        Args:
            image_embeddings: The embeddings of the images, `(items, dim)`, with norm 1.
            text_embeddings: Those of their captions, `(items, dim)`.
            negative_embeddings: Those of the wrong captions, `(items, dim)`.
            item_id: The number of each item, int64 `(items,)`.
            category: The category of each item, int64 `(items,)`. Default: all have the first.

        Raises:
            ValueError: if the shapes do not match.
        """
        shapes = {tuple(part.shape) for part in (image_embeddings, text_embeddings, negative_embeddings)}
        category = torch.zeros_like(item_id) if category is None else category
        if len(shapes) > 1 or image_embeddings.ndim != 2 or not len(image_embeddings) == len(item_id) == len(category):
            raise ValueError(
                f"Expected three sets of embeddings of one shape (items, dim), got {sorted(shapes)}, with "
                f"{len(item_id)} ids and {len(category)} categories."
            )
        dtype = torch.float32 if image_embeddings.device.type == "mps" else torch.float64
        image = image_embeddings.detach().to(dtype)
        right, wrong = ((image * text.detach().to(dtype)).sum(dim=1) for text in (text_embeddings, negative_embeddings))
        self.margin.append(right - wrong)  # (items,)
        self.category.append(category)
        self.item_id.append(item_id)

    def compute(self) -> dict[str, Tensor]:
        """Return percentages: ``accuracy`` over all items, and one value for each category that has items."""
        if len(self.margin) == 0:  # a list of batches, or after a gather one tensor
            raise ValueError("Expected at least one batch before `compute`, got none. Call `update` first.")
        margin, category, item_id = (dim_zero_cat(getattr(self, name)) for name in ("margin", "category", "item_id"))
        unique, group = item_id.unique(return_inverse=True)
        rows = torch.arange(len(item_id), device=item_id.device)
        first = torch.full_like(unique, len(item_id)).scatter_reduce(0, group, rows, "amin")  # (items,)
        margin, category = margin[first], category[first]
        if not bool(margin.isfinite().all()):
            bad = unique[~margin.isfinite()]
            raise ValueError(
                f"Expected embeddings to be finite, got NaN or infinity in {len(bad)} of {len(unique)} items, the first "
                f"{int(bad[0])}. Did training diverge?"
            )
        is_right = (margin > ROUNDING).float()  # not >=: a collapsed model has no opinion
        values = {"accuracy": 100 * is_right.mean()}
        for number, name in enumerate(self.names):
            if bool((own := category == number).any()):
                values[name] = 100 * is_right[own].mean()
        return values
