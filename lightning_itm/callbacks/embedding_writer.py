"""The embeddings of a whole set, in files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_itm.callbacks._rows import describe_image, describe_text, write_jsonl
from lightning_itm.data.datamodule import ImageTextDataModule
from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.distributed import world_size


class EmbeddingWriter(Callback):
    """Write the embeddings of ``Trainer.predict`` to a folder, in the order of the ids.

    ``image.npy`` `(images, dim)` and ``text.npy`` `(texts, dim)`, unit-norm, float32, NaN where one can't be read;
    ``images.jsonl`` and ``texts.jsonl`` say what each row is, and which image a text belongs to. It needs an
    :class:`~lightning_itm.ImageTextDataModule`.

    Args:
        folder: Where to; it must not hold results already.

    Raises:
        FileExistsError: It does.
        MisconfigurationException: Another datamodule, or none.
    """

    consequence = "Their rows are NaN."
    results: Sequence[str] = ("image.npy", "text.npy", "images.jsonl", "texts.jsonl")

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._found: dict[str, list[Tensor]] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Say what would be overwritten, or left out, before anything is encoded."""
        if stage != "predict":
            return
        there = [name for name in self.results if (self.folder / name).exists()]
        if there:
            raise FileExistsError(
                f"Expected a folder without results, got {self.folder} with {', '.join(there)}. Name another one."
            )
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(datamodule, ImageTextDataModule):
            raise MisconfigurationException(
                f"Expected an ImageTextDataModule, which knows what each row is, got {type(datamodule).__name__}."
            )
        limit = trainer.limit_predict_batches  # the integer 1 is one batch, the float all of them
        if trainer.fast_dev_run or limit != 1.0 or isinstance(limit, int):  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "Expected to encode the whole set, got `fast_dev_run` or `limit_predict_batches="
                f"{limit}`. Leave them out, or give a smaller set."
            )

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start anew."""
        self._found = {f"{kind}{part}": [] for kind in ("image", "text") for part in ("", "_id", "_is_valid")}

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what was found, where it is: nobody waits for the device."""
        for name, parts in self._found.items():
            if name in outputs:
                parts.append(outputs[name])

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the parts of all ranks together, and write them."""
        pairs: ImageTextDataset = trainer.datamodule.predict_pairs()  # type: ignore[attr-defined]
        sizes = {"image": len(pairs.images), "text": len(pairs.texts)}
        whole = {kind: self._whole(kind, size) for kind, size in sizes.items()}
        self._found = {}
        for kind, (_, is_valid) in whole.items():
            if not bool(is_valid.all()):
                invalid = (~is_valid).nonzero().squeeze(1).tolist()
                describe = describe_image if kind == "image" else describe_text
                rank_zero_warn(
                    f"{len(invalid)} of {sizes[kind]} {kind}s can't be read, the first: {describe(pairs, invalid[0])}. "
                    f"{self.consequence}"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write(trainer, pairs, *whole["image"], *whole["text"])
        rank_zero_info(f"{sizes['image']} images and {sizes['text']} texts: {', '.join(self.results)} in {self.folder}")

    def write(
        self,
        trainer: L.Trainer,
        pairs: ImageTextDataset,
        image: Tensor,
        image_is_valid: Tensor,
        text: Tensor,
        text_is_valid: Tensor,
    ) -> None:
        """Write all embeddings; called on every rank. Override to do something else with them.

        Args:
            trainer: Who predicts.
            pairs: What was encoded.
            image: `(images, dim)`, by id, on the module's device.
            image_is_valid: bool `(images,)`; where the image could be read.
            text: `(texts, dim)`, by id.
            text_is_valid: bool `(texts,)`.
        """
        if trainer.is_global_zero:
            for name, values, is_valid in (("image", image, image_is_valid), ("text", text, text_is_valid)):
                rows = values.float().masked_fill(~is_valid[:, None], torch.nan)
                np.save(self.folder / f"{name}.npy", rows.cpu().numpy())
            write_jsonl(self.folder / "images.jsonl", (describe_image(pairs, i) for i in range(len(image))))
            write_jsonl(self.folder / "texts.jsonl", (describe_text(pairs, i) for i in range(len(text))))

    def _whole(self, kind: str, number: int) -> tuple[Tensor, Tensor]:
        values, ids, is_valid = (torch.cat(self._found[f"{kind}{part}"]) for part in ("", "_id", "_is_valid"))
        if world_size() > 1:
            values, ids, is_valid = (torch.cat(gather_all_tensors(part)) for part in (values, ids, is_valid))
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"Expected finite {kind} embeddings, got NaN or infinity. Is the checkpoint of a run that diverged?"
            )
        whole = values.new_zeros(number, values.shape[1]).index_copy_(0, ids, values)
        return whole, is_valid.new_zeros(number).index_copy_(0, ids, is_valid)
