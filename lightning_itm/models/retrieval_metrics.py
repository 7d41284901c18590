"""The retrieval metrics of validation and test: one per stage and loader."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torchmetrics import Metric

from lightning_itm.data.batch import check_batch
from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.metrics.compositional import CompositionalAccuracy
from lightning_itm.metrics.image_text_retrieval import ImageTextRetrieval

_SHARDED = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)
_Key = tuple[str, int, tuple[str, ...]]  # the stage, the number of the loader, and categories where it has them


class RetrievalMetrics:
    """Keep one metric for each stage and loader, made when its first batch arrives.

    This is a plain object and no ``nn.Module``: the metrics are no part of the model's weights.

    Example:
        >>> import torch
        >>> from lightning_itm.embeddings import EmbeddingPairs
        >>> from lightning_itm.metrics import ImageTextRetrieval
        >>> metrics = RetrievalMetrics()
        >>> pairs = EmbeddingPairs(torch.eye(2), torch.eye(2), torch.arange(2), torch.arange(2))
        >>> metrics.update("val", 1, pairs, make=lambda stage: ImageTextRetrieval(recall_at=(1,)))
        >>> [values["val_1/rsum"] for values in metrics.compute("val")]
        [tensor(200.)]
    """

    def __init__(self) -> None:
        self._metrics: dict[_Key, Metric] = {}
        self._last: dict[tuple[str, int], tuple[Tensor, Tensor, Tensor]] = {}  # the last image of a loader's last batch

    def take(self, stage: str, dataloader_idx: int, batch: Any, module: Any) -> None:
        """Encode a batch, and take it into the metric of its stage and loader.

        Pairs that follow each other with one image, as several captions of it do, have it encoded once. So an image is known
        by its id *and* its pixels: where a loader numbers two images alike, both are encoded, and the metric finds out. A
        module with an ``embed`` of its own, images that are no tensor, modules with parts in train mode, whose outputs may
        depend on the other rows, and strategies that shard the weights encode each pair as it comes.

        Args:
            stage: ``"val"`` or ``"test"``, which begins the names of what is logged.
            dataloader_idx: The number of the loader, from 0, as Lightning passes it to a step.
            batch: Pairs, or items of a :class:`~lightning_itm.data.CompositionalDataset`, which have a ``"negative_text"``.
            module: The :class:`~lightning_itm.DualEncoder`.
        """
        pairs = self._embed(stage, dataloader_idx, batch, module)
        if not isinstance(batch, Mapping) or "negative_text" not in batch:
            self.update(stage, dataloader_idx, pairs, make=module.configure_retrieval)
            return
        names = tuple(batch["category_names"])
        metric = self._of((stage, dataloader_idx, names), pairs, lambda _: _Compositional(names))
        negative = module._unit_vectors("text", batch["negative_text"])
        embeddings = pairs.image_embeddings, pairs.text_embeddings, negative
        metric.update(*embeddings, item_id=pairs.text_id, category=batch["category"])

    def update(
        self, stage: str, dataloader_idx: int, pairs: EmbeddingPairs, *, make: Callable[[str], ImageTextRetrieval]
    ) -> None:
        """Take a batch into the metric of its stage and loader.

        Args:
            stage: ``"val"`` or ``"test"``, which begins the names of what is logged.
            dataloader_idx: The number of the loader, from 0, as Lightning passes it to a step.
            pairs: The embeddings of the batch.
            make: A function from the stage to a new metric. It is called for the first batch of a loader.
        """
        self._of((stage, dataloader_idx, ()), pairs, make).update(pairs)

    def _embed(self, stage: str, index: int, batch: Any, module: Any) -> EmbeddingPairs:
        """Embed a batch, with an image that several consecutive rows have encoded once."""
        if not _can_share(batch, module):
            return module.embed(batch)  # type: ignore[no-any-return]
        check_batch(batch)
        image, image_id = batch["image"], batch["image_id"]
        is_new = torch.ones_like(image_id, dtype=torch.bool)  # (pairs,): not the image of the row before
        is_new[1:] = _differ(image[1:], image_id[1:], image[:-1], image_id[:-1])
        last = self._last.get((stage, index))
        if last is not None and last[0].shape == image[:1].shape:
            is_new[:1] = _differ(image[:1], image_id[:1], *last[:2])
        parts = [] if is_new[0] or last is None else [last[2]]
        if bool(is_new.any()):
            parts.append(module._unit_vectors("image", image[is_new]))
        vectors = torch.cat(parts)  # (distinct images, dim)
        vectors = vectors[is_new.long().cumsum(0) - int(is_new[0])]  # (pairs, dim)
        # Clones: a view would keep the whole batch in memory.
        self._last[stage, index] = image[-1:].clone(), image_id[-1:].clone(), vectors[-1:].clone()
        text = module._unit_vectors("text", batch["text"])
        return EmbeddingPairs(vectors, text, image_id, batch["text_id"], batch.get("caption_id"))

    def _of(self, key: _Key, pairs: EmbeddingPairs, make: Callable[[str], Metric]) -> Metric:
        if key not in self._metrics:
            self._metrics[key] = make(key[0]).to(pairs.image_embeddings.device)
        return self._metrics[key]

    def compute(self, stage: str) -> Iterator[dict[str, Tensor]]:
        """Yield the values of each loader under the names to log, and empty its metric.

        The first loader's names begin with the stage (``val/rsum``), those of the others with their number as well
        (``val_1/rsum``).
        """
        self._last.clear()
        for (of_stage, index, _), metric in self._metrics.items():
            # A loader of an earlier run may be missing in this one.
            if of_stage == stage and metric.update_called:
                prefix = stage if index == 0 else f"{stage}_{index}"
                yield {f"{prefix}/{name}": value for name, value in metric.compute().items()}
                metric.reset()  # which also frees the embeddings

    def reset(self, stage: str) -> None:
        """Empty the metrics of a stage."""
        self._last.clear()  # of other weights, perhaps
        for (of_stage, _, _), metric in self._metrics.items():
            if of_stage == stage:
                metric.reset()


def _can_share(batch: Any, module: Any) -> bool:
    from lightning_itm.models.dual_encoder import DualEncoder  # here, because it imports this module

    return (
        type(module).embed is DualEncoder.embed
        and isinstance(batch, Mapping)
        and isinstance(batch.get("image"), Tensor)
        and batch["image"].ndim > 1
        and isinstance(batch.get("image_id"), Tensor)
        and len(batch["image"]) == len(batch["image_id"]) > 0
        and not any(part.training for part in module.modules())
        # There each rank must call the towers as often as the others, and their batches may hold other numbers of images.
        and not isinstance(getattr(module._trainer, "strategy", None), _SHARDED)
    )


def _differ(image: Tensor, image_id: Tensor, other: Tensor, other_id: Tensor) -> Tensor:
    """Tell row by row whether two batches have different images, bool `(rows,)`."""
    return (image_id != other_id) | (image != other).flatten(1).any(dim=1)


class _Compositional(CompositionalAccuracy):
    """The same, under names that say what it is among others that are logged."""

    def compute(self) -> dict[str, Tensor]:
        """Return ``compositional_accuracy``, and ``compositional_<category>`` for each category."""
        return {f"compositional_{name}": value for name, value in super().compute().items()}
