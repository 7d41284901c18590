"""The retrieval metrics of validation and test: one per stage and loader."""

from collections.abc import Callable, Iterator

from torch import Tensor

from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.metrics.image_text_retrieval import ImageTextRetrieval


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
        self._metrics: dict[tuple[str, int], ImageTextRetrieval] = {}

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
        key = stage, dataloader_idx
        if key not in self._metrics:
            self._metrics[key] = make(stage).to(pairs.image_embeddings.device)
        self._metrics[key].update(pairs)

    def compute(self, stage: str) -> Iterator[dict[str, Tensor]]:
        """Yield the values of each loader under the names to log, and empty its metric.

        The first loader's names begin with the stage (``val/rsum``), those of the others with their number as well
        (``val_1/rsum``).
        """
        for (of_stage, index), metric in self._metrics.items():
            # A loader of an earlier run may be missing in this one.
            if of_stage == stage and metric.update_called:
                prefix = stage if index == 0 else f"{stage}_{index}"
                yield {f"{prefix}/{name}": value for name, value in metric.compute().items()}
                metric.reset()  # which also frees the embeddings

    def reset(self, stage: str) -> None:
        """Empty the metrics of a stage."""
        for (of_stage, _), metric in self._metrics.items():
            if of_stage == stage:
                metric.reset()
