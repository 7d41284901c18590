"""How negatives.py judges a model: rsum on both held-out sets, with and without the whole set as candidates."""

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, Subset

from lightning_itm import ImageTextDataset, ImageTextRetrieval
from lightning_itm.data import EvaluationItems, collate_pairs
from lightning_itm.data.evaluation_items import KINDS
from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.functional import recall_at_k, retrieval_rank
from lightning_itm.functional.similarity import unit_norm

ENCODED_AT_ONCE = 50


def seconds(device: torch.device) -> float:
    """Return the processor time of this process. For a GPU, wait until it has finished, and return the wall clock."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


class Evaluate(Callback):
    """Compute rsum on both held-out sets after each epoch, and measure the time of steps and of evaluation."""

    def __init__(self, *, is_tuning: bool = False) -> None:
        self.is_tuning = is_tuning  # then the test set stays unseen
        self.val: list[dict[str, float]] = []
        self.test: list[dict[str, float]] = []
        self.steps: list[float] = []
        self.start, self.evaluation = 0.0, 0.0

    def on_train_batch_start(self, _: L.Trainer, pl_module: L.LightningModule, *__: Any) -> None:
        """Start the clock."""
        self.start = seconds(pl_module.device)

    def on_train_batch_end(self, _: L.Trainer, pl_module: L.LightningModule, *__: Any) -> None:
        """Stop it."""
        self.steps.append(seconds(pl_module.device) - self.start)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        start = seconds(pl_module.device)
        self.val.append(retrieve(pl_module, data.val_dataset))
        if not self.is_tuning:
            self.test.append(retrieve(pl_module, data.test_dataset))
        pl_module.train()
        self.evaluation += seconds(pl_module.device) - start


@torch.no_grad()
def embed_set(model: Any, pairs: ImageTextDataset) -> EmbeddingPairs:
    """Encode each image and each text of a set once, short texts together, in batches that fit a processor's cache."""
    model.eval()
    rows = {}
    for kind in KINDS:
        items = EvaluationItems(pairs, kind)
        length = torch.tensor([len(text) for text in pairs.texts] if kind == "text" else [0] * len(items))
        order = length.argsort(stable=True)
        loader = DataLoader(Subset(items, order.tolist()), ENCODED_AT_ONCE, collate_fn=collate_pairs)
        found = torch.cat(
            [
                unit_norm(getattr(model, f"encode_{kind}")(batch[kind].to(model.device))).float().cpu()
                for batch in loader
            ]
        )
        rows[kind] = torch.empty_like(found).index_copy_(0, order, found)
    owner = pairs.text_image_id
    return EmbeddingPairs(rows["image"][owner], rows["text"], owner, torch.arange(len(owner)))


def retrieve(model: Any, pairs: Any) -> dict[str, float]:
    """Return rsum and R@1 in both directions."""
    metric = ImageTextRetrieval()
    metric.update(embed_set(model, pairs))
    values = metric.compute()
    return {name: float(values[name]) for name in ("rsum", "i2t_r1", "t2i_r1")}


def gallery_rsum(model: Any, sets: list[Any]) -> float:
    """Return rsum of the last set, with the pairs of all sets as candidates."""
    parts, offset_image, offset_text = [], 0, 0
    for pairs in sets:
        found = embed_set(model, pairs)
        ids = found.image_id + offset_image, found.text_id + offset_text
        parts.append(EmbeddingPairs(found.image_embeddings, found.text_embeddings, *ids))
        offset_image, offset_text = offset_image + len(pairs.images), offset_text + len(pairs.texts)
    everything, test = parts[0], parts[-1]
    for part in parts[1:]:
        everything = everything + part
    total = 0.0
    texts = everything.text_embeddings, everything.image_id
    for anchors, (keys, key_id) in ((test.image_embeddings, texts), (test.text_embeddings, first_of_each(everything))):
        rank = retrieval_rank(anchors, keys, query_id=test.image_id, key_id=key_id)
        total += sum(float(recall_at_k(rank, k)) for k in (1, 5, 10))
    return total


def first_of_each(pairs: EmbeddingPairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each image once."""
    ids, inverse = pairs.image_id.unique(return_inverse=True)
    first = torch.full((len(ids),), len(pairs)).scatter_reduce(0, inverse, torch.arange(len(pairs)), "amin")
    return pairs.image_embeddings[first], ids
