"""The embeddings of a whole set, in files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_itm.data.export import describe_image, describe_text, write_jsonl
from lightning_itm.data.pairs import ImageTextPairs
from lightning_itm.distributed import world_size


class EmbeddingWriter(Callback):
    """Write the embeddings of ``Trainer.predict`` to a folder, in the order of the ids.

    ``image.npy`` `(images, dim)` and ``text.npy`` `(texts, dim)`, unit-norm, float32; ``images.jsonl`` and ``texts.jsonl`` say
    what each row is, and which image a text belongs to. It needs an :class:`~lightning_itm.ImageTextDataModule`.

    Args:
        folder: Where to; it must not hold results already.

    Raises:
        FileExistsError: It does.
        MisconfigurationException: Another datamodule, or none.
    """

    results: Sequence[str] = ("image.npy", "text.npy", "images.jsonl", "texts.jsonl")

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._found: dict[str, list[Tensor]] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Say what would be overwritten before anything is encoded."""
        there = [name for name in self.results if (self.folder / name).exists()]
        if stage == "predict" and there:
            raise FileExistsError(
                f"Expected a folder without results, got {self.folder} with {', '.join(there)}. Name another one."
            )

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start anew."""
        self._found = {"image": [], "image_id": [], "text": [], "text_id": []}

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what was found."""
        values = outputs if isinstance(outputs, dict) else vars(outputs)
        for name, parts in self._found.items():
            if name in values:
                parts.append(values[name].cpu())

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the parts of all ranks together, and write them."""
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(datamodule, "predict_pairs"):
            raise MisconfigurationException(
                f"Expected an ImageTextDataModule, which knows what was encoded, got {type(datamodule).__name__}."
            )
        pairs = datamodule.predict_pairs()
        sizes = {"image": len(pairs.images), "text": len(pairs.texts)}
        image, text = (self._whole(kind, size, pl_module.device) for kind, size in sizes.items())
        self._found = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write(trainer, pairs, image, text)
        rank_zero_info(f"{len(image)} images and {len(text)} texts: {', '.join(self.results)} in {self.folder}")

    def write(self, trainer: L.Trainer, pairs: ImageTextPairs, image: Tensor, text: Tensor) -> None:
        """Write all embeddings; called on every rank. Override to do something else with them.

        Args:
            trainer: Who predicts.
            pairs: What was encoded.
            image: `(images, dim)`, by id, on the module's device.
            text: `(texts, dim)`, by id.
        """
        if trainer.is_global_zero:
            np.save(self.folder / "image.npy", image.float().cpu().numpy())
            np.save(self.folder / "text.npy", text.float().cpu().numpy())
            write_jsonl(self.folder / "images.jsonl", (describe_image(pairs, i) for i in range(len(image))))
            write_jsonl(self.folder / "texts.jsonl", (describe_text(pairs, i) for i in range(len(text))))

    def _whole(self, kind: str, number: int, device: torch.device) -> Tensor:
        values, ids = (torch.cat(self._found[name]).to(device) for name in (kind, f"{kind}_id"))
        if world_size() > 1:
            values, ids = (torch.cat(gather_all_tensors(part)) for part in (values, ids))
        whole = values.new_full((number, values.shape[1]), torch.nan).index_copy_(0, ids, values)
        if not bool(whole.isfinite().all()):
            missing = number - int(ids.unique().numel())
            raise ValueError(
                f"Expected a finite embedding of each of the {number} {kind}s, got "
                + (f"none of {missing}: was `limit_predict_batches` set?" if missing else "NaN or infinity.")
            )
        return whole
