"""Write the embeddings of a whole set to files."""

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

from lightning_itm.callbacks._rows import check_no_results, describe_image, describe_text, whole_files, write_jsonl
from lightning_itm.callbacks._strategies import check_equal_batches
from lightning_itm.data.datamodule import ImageTextDataModule
from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.mining.encoded import EncodedRows


class EmbeddingWriter(Callback):
    """Write the embeddings of ``Trainer.predict`` to a folder, in the order of the ids.

    ``image.npy`` `(images, dim)` and ``text.npy`` `(texts, dim)` are unit-norm, float32, and NaN where an input can't be read.
    ``images.jsonl`` and ``texts.jsonl`` say what each row is, and to which image each text belongs. It needs an
    :class:`~lightning_itm.ImageTextDataModule`.

    Args:
        folder: Where the files are written. It is made, and must not hold results already.

    Raises:
        FileExistsError: if the folder already holds results.
        MisconfigurationException: if the datamodule is of another kind, or only a part of the set would be encoded.
    """

    consequence = "Their rows are NaN."
    """What happens to inputs that can't be read, for the warning."""
    results: Sequence[str] = ("image.npy", "text.npy", "images.jsonl", "texts.jsonl")
    """The names of the files that are written."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._rows: list[EncodedRows] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raise if files would be overwritten, or rows left out."""
        # In `setup`, before anything is encoded, which may take hours.
        if stage != "predict":
            return
        check_no_results(self.folder, self.results)
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
        """Forget the rows of an earlier run."""
        check_equal_batches(trainer, pl_module.device)
        # In the order of the datamodule's loaders. Here, so that a run that broke off leaves nothing behind.
        pairs: ImageTextDataset = trainer.datamodule.predict_pairs()  # type: ignore[attr-defined]
        self._rows = [EncodedRows("image", len(pairs.images)), EncodedRows("text", len(pairs.texts))]

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the embeddings of a batch."""
        # Batch by batch: with `return_predictions=False`, as for large sets, Lightning keeps nothing for us.
        self._rows[dataloader_idx].add(outputs)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the parts of all ranks together, and write them."""
        # Every rank runs this hook, as the gather needs.
        pairs: ImageTextDataset = trainer.datamodule.predict_pairs()  # type: ignore[attr-defined]
        way_out = "Is the checkpoint of a run that diverged?"
        (image, image_is_valid), (text, text_is_valid) = (rows.in_order(way_out=way_out) for rows in self._rows)
        self._rows = []
        for kind, is_valid, describe in (
            ("image", image_is_valid, describe_image),
            ("text", text_is_valid, describe_text),
        ):
            if not bool(is_valid.all()):
                invalid = (~is_valid).nonzero().squeeze(1).tolist()
                rank_zero_warn(
                    f"{len(invalid)} of {len(is_valid)} {kind}s can't be read, the first: "
                    f"{describe(pairs, invalid[0])}. {self.consequence}"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write(trainer, pairs, image, image_is_valid, text, text_is_valid)
        rank_zero_info(f"{len(image)} images and {len(text)} texts: {', '.join(self.results)} in {self.folder}")

    def write(
        self,
        trainer: L.Trainer,
        pairs: ImageTextDataset,
        image_embeddings: Tensor,
        image_is_valid: Tensor,
        text_embeddings: Tensor,
        text_is_valid: Tensor,
    ) -> None:
        """Write all embeddings. It is called on every rank. Override it to do something else with them.

        Args:
            trainer: The Trainer that predicts.
            pairs: The set that was encoded.
            image_embeddings: `(images, dim)`, in the order of the ids, on the module's device.
            image_is_valid: bool `(images,)`, whether the image could be read.
            text_embeddings: `(texts, dim)`, in the order of the ids, on the module's device.
            text_is_valid: bool `(texts,)`, whether the text could be read.
        """
        if not trainer.is_global_zero:
            return
        with whole_files(self.folder, self.results) as part:
            for name, embeddings, is_valid in (
                ("image", image_embeddings, image_is_valid),
                ("text", text_embeddings, text_is_valid),
            ):
                # What can't be read has the embedding of a stand-in, which must not pass for its own.
                rows = embeddings.float().masked_fill(~is_valid[:, None], torch.nan)  # (rows, dim)
                np.save(part / f"{name}.npy", rows.cpu().numpy())
            write_jsonl(part / "images.jsonl", (describe_image(pairs, i) for i in range(len(image_is_valid))))
            write_jsonl(part / "texts.jsonl", (describe_text(pairs, i) for i in range(len(text_is_valid))))
