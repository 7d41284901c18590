"""Hard negatives over the whole training set, mined with the model as it stands."""

import hashlib
import time
from typing import Any, Literal

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import Dataset

from lightning_itm.callbacks._strategies import check_whole_weights
from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.data.shards.stream import ShardStream
from lightning_itm.mining.embedded_negatives import EmbeddedNegatives
from lightning_itm.mining.encode import encode_pairs, is_progress_shown
from lightning_itm.mining.figure import contact_sheet
from lightning_itm.mining.hard_negative_dataset import HardNegativeDataset
from lightning_itm.mining.negative_table import NegativeTable
from lightning_itm.mining.search import find_negatives, padded_rows

FAST_DEV_RUN_PAIRS = 512


class OfflineHardNegativeMining(Callback):
    """Before an epoch, find each image's hardest texts and each text's hardest images among all others (AOQ).

    Every image and every text is encoded once, with evaluation transforms, in eval mode and under the Trainer's precision,
    split over the ranks. Each pair of the epoch then comes with a draw from what was found. ``QuintupletLoss`` is the loss for
    it; the others take the mined pairs as further candidates.

    Args:
        dataset: What is mined, if it is not the datamodule's ``train_dataset``: an :class:`~lightning_itm.ImageTextDataset`,
            the :class:`~lightning_itm.HardNegativeDataset` around it that the train loader reads, or the
            :class:`~lightning_itm.ShardStream` that is trained on; of remote shards with ``inject="embeddings"`` alone.
        texts_per_image: Texts kept for an image.
        images_per_text: Images kept for a text.
        every_n_epochs: Mine anew after so many epochs; ``None``: once, as published.
        start_epoch: The first epoch with mined negatives.
        inject: ``"samples"``: the negatives are loaded with the pair and encoded with gradient. ``"embeddings"`` (ours): they
            come as the embeddings of the mining pass; no further forward pass, no gradient through them.
        coupled_ranks: One draw for text and image, as published, or two.
        rank_min: See :func:`~lightning_itm.functional.top_k_negatives` for this and the next three guards (ours). The positive
            of an anchor is the mean over its own.
        max_score: A guard.
        absolute_margin: A guard.
        relative_margin: A guard.
        batch_size: Of the encoding.
        num_workers: Of the encoding; default: those of the datamodule.
        seed: Of the draws among embeddings.

    Logs ``mining/encode_seconds``, ``mining/search_seconds``, ``mining/gap`` (mean similarity of the positive minus that of
    the hardest mined negative), ``mining/rejected_share`` (of the unguarded places, dropped by a guard) and
    ``mining/changed_share`` (of the places, with another negative than before).

    Raises:
        ValueError: A count that is not positive; a checkpoint of another set; embeddings that are not finite, when mining.
        MisconfigurationException: No dataset, one of another kind, or a strategy that shards the weights.

    References:
        *Adaptive Offline Quintuplet Loss for Image-Text Matching*, ECCV 2020, arXiv 2003.03669: mined once, with a model that
        was trained before. Each epoch anew is ours.
    """

    def __init__(
        self,
        dataset: Dataset[Any] | None = None,
        *,
        texts_per_image: int = 300,
        images_per_text: int = 60,
        every_n_epochs: int | None = 1,
        start_epoch: int = 0,
        inject: Literal["samples", "embeddings"] = "samples",
        coupled_ranks: bool = True,
        rank_min: int = 0,
        max_score: float | None = None,
        absolute_margin: float | None = None,
        relative_margin: float | None = None,
        batch_size: int = 256,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("texts_per_image", texts_per_image, 1),
            ("images_per_text", images_per_text, 1),
            ("every_n_epochs", every_n_epochs, 1),
            ("start_epoch", start_epoch, 0),
            ("rank_min", rank_min, 0),
            ("batch_size", batch_size, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"Expected `{name}` to be at least {least}, got {value}.")
        if inject not in ("samples", "embeddings"):
            raise ValueError(f"Expected `inject` to be 'samples' or 'embeddings', got {inject!r}.")
        self.dataset = dataset
        self.texts_per_image, self.images_per_text = texts_per_image, images_per_text
        self.every_n_epochs, self.start_epoch = every_n_epochs, start_epoch
        self.inject, self.coupled_ranks = inject, coupled_ranks
        self.rank_min = rank_min
        self.limits = {"max_score": max_score, "absolute_margin": absolute_margin, "relative_margin": relative_margin}
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.pairs: ImageTextDataset | None = None
        self.table: NegativeTable | None = None
        self.embedded: EmbeddedNegatives | None = None
        self._epoch, self._is_finished, self._is_fitting = 0, False, False
        self._restored: dict[str, Any] | None = None
        self._unlogged: dict[str, float] = {}

    def is_due(self, epoch: int) -> bool:
        """Return whether ``epoch`` begins with a new table. Override for another schedule."""
        if epoch < self.start_epoch or self.every_n_epochs is None:
            return epoch == self.start_epoch
        return (epoch - self.start_epoch) % self.every_n_epochs == 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the pairs, and let each come with its draw."""
        self._is_fitting = stage == "fit"
        if not self._is_fitting:
            return
        check_whole_weights(trainer, "mining encodes with the whole module")
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        dataset = self.dataset if self.dataset is not None else getattr(datamodule, "train_dataset", None)
        pairs = dataset.pairs if isinstance(dataset, HardNegativeDataset | ShardStream) else dataset
        if not isinstance(pairs, ImageTextDataset):
            raise MisconfigurationException(
                f"Expected pairs to mine, got {type(pairs).__name__}. Give `dataset=ImageTextDataset(...)`, or fit with an "
                "ImageTextDataModule that has them as `train_dataset`."
            )
        self.pairs, (num_images, num_texts) = pairs, (len(pairs.images), len(pairs.texts))
        if num_images < 2:
            raise MisconfigurationException(f"Expected at least two images to mine among, got {num_images}.")
        self.table = NegativeTable(
            num_images, num_texts, texts_per_image=self.texts_per_image, images_per_text=self.images_per_text
        )
        self.table.is_pending = True
        self._epoch, self._is_finished, self._restored, self.embedded = 0, False, None, None
        if isinstance(dataset, ShardStream):
            self._draw_in(dataset)
            return
        if self.inject == "embeddings":
            if datamodule is not None and dataset is datamodule.train_dataset:
                datamodule.train_dataset = pairs  # without the draws of an earlier callback
            return
        if isinstance(dataset, HardNegativeDataset) and (self.dataset is not None or datamodule is None):
            dataset.table, dataset.coupled_ranks = self.table, self.coupled_ranks  # the loader is the user's own
        elif datamodule is not None and getattr(datamodule, "train_dataset", None) in (dataset, pairs):
            datamodule.train_dataset = HardNegativeDataset(pairs, self.table, coupled_ranks=self.coupled_ranks)
        else:
            raise MisconfigurationException(
                "Expected an ImageTextDataModule with the pairs as `train_dataset`, or `dataset=HardNegativeDataset(pairs)` "
                "that the train loader reads; got neither, and no negative would reach a batch."
            )

    def _draw_in(self, stream: ShardStream) -> None:
        if self.inject == "embeddings":
            stream.negatives = None  # of an earlier callback
            return
        if not stream.pairs.is_local:
            raise MisconfigurationException(
                f"Expected local shards with `inject='samples'`, which reads mined images at random, got "
                f"{stream.pairs.contents.shards[0]}. Use `inject='embeddings'`, or copy the shards."
            )
        stream.negatives = HardNegativeDataset(stream.pairs, self._table(), coupled_ranks=self.coupled_ranks)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the datamodule as it was, and no file behind; the table stays, to be looked at."""
        if stage != "fit" or self.table is None:
            return
        table = self.table
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        dataset = getattr(datamodule, "train_dataset", None)
        if isinstance(dataset, HardNegativeDataset) and dataset is not self.dataset and dataset.table is table:
            datamodule.train_dataset = dataset.pairs
        stream = dataset if self.dataset is None else self.dataset
        if isinstance(stream, ShardStream) and getattr(stream.negatives, "table", None) is table:
            stream.negatives = None
        table.remove()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mine for the first epoch, or go on with the restored table."""
        restored, self._restored = self._restored, None
        epoch = 0 if restored is None else int(restored["epoch"]) + bool(restored["is_finished"])
        table = self._table()
        self._epoch = epoch
        if trainer.limit_train_batches == 0:
            table.is_pending = False
        elif epoch != trainer.max_epochs and self._has_to_mine(epoch, restored):
            self._mine(trainer, pl_module)
        else:
            table.is_pending = False
            if restored is not None and restored["embeddings"] is not None and self.inject == "embeddings":
                self._embed(*(part.to(pl_module.device) for part in restored["embeddings"]))

    def _has_to_mine(self, epoch: int, restored: dict[str, Any] | None) -> bool:
        if restored is None:
            return self.is_due(epoch)
        # A run with samples that goes on with embeddings has none of them.
        has_none = restored["embeddings"] is None and bool((restored["texts"] >= 0).any())
        return (restored["is_finished"] and self.is_due(epoch)) or (self.inject == "embeddings" and has_none)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the first mining; earlier, Lightning takes no logs."""
        self._log(pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what was mined for this epoch."""
        self._log(pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put the drawn embeddings into the batch."""
        if self.embedded is not None:
            batch["hard"] = self.embedded.draw(batch["image_id"], batch["text_id"], trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember whether the epoch is finished, for a checkpoint of its last batch."""
        self._is_finished = trainer.is_last_batch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mine for the next epoch, if there is one."""
        epoch = trainer.current_epoch + 1
        if epoch <= self._epoch or epoch == trainer.max_epochs:
            return  # `trainer.should_stop` is no reason: with `min_epochs`, Lightning goes on
        self._epoch, self._is_finished = epoch, False
        if self.is_due(epoch):
            self._mine(trainer, pl_module)

    def plot(self, n: int = 8, *, num_negatives: int = 4, seed: int = 0) -> Any:
        """Draw some pairs with the hardest texts and images that were mined for them.

        Args:
            n: Number of pairs, taken at random.
            num_negatives: Texts and images shown for each, the hardest first.
            seed: Of the choice.

        Returns:
            A matplotlib figure.
        """
        return contact_sheet(self._pairs(), self._table(), n, num_negatives=num_negatives, seed=seed)

    def state_dict(self) -> dict[str, Any]:
        """Return the table, the embeddings where they are injected, and which epoch they are for."""
        if self.table is None:
            return {}
        return {
            "texts": self.table.texts.clone(),
            "images": self.table.images.clone(),
            "embeddings": None
            if self.embedded is None
            else [self.embedded.image_embeddings.cpu(), self.embedded.text_embeddings.cpu()],
            "epoch": self._epoch,
            "is_finished": bool(self._is_finished),
            "fingerprint": fingerprint(self._pairs()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Publish the table of a checkpoint, in a run that goes on.

        Raises:
            ValueError: It is of another set, or of another size.
        """
        if self.table is None or not self._is_fitting or not state_dict:
            return
        if state_dict["fingerprint"] != fingerprint(self._pairs()):
            raise ValueError(
                "Expected the checkpoint's negatives to be of this training set, got those of another: its images, texts or "
                "their order differ. Resume with the same data, or start from the weights alone (`load_from_checkpoint`)."
            )
        places = state_dict["texts"].shape[1], state_dict["images"].shape[1]
        if places != (self.texts_per_image, self.images_per_text):
            raise ValueError(
                f"Expected {self.texts_per_image} texts and {self.images_per_text} images a row, got {places} in the "
                "checkpoint. Resume with the same `texts_per_image` and `images_per_text`."
            )
        self._restored = state_dict
        if not (state_dict["is_finished"] and self.is_due(int(state_dict["epoch"]) + 1)):
            self.table.publish(state_dict["texts"], state_dict["images"])
        else:
            self.table.texts.copy_(state_dict["texts"])  # what the next mining is compared with
            self.table.images.copy_(state_dict["images"])

    def _mine(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pairs, table, datamodule = self._pairs(), self._table(), trainer.datamodule  # type: ignore[attr-defined]
        num_workers = getattr(datamodule, "num_workers", 0) if self.num_workers is None else self.num_workers
        num_texts = min(len(pairs), FAST_DEV_RUN_PAIRS) if trainer.fast_dev_run else len(pairs)  # type: ignore[attr-defined]
        start = time.perf_counter()
        encoded = encode_pairs(
            trainer, pl_module, pairs, num_texts, batch_size=self.batch_size, num_workers=num_workers
        )
        between = time.perf_counter()
        found = find_negatives(
            encoded,
            self.texts_per_image,
            self.images_per_text,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            is_shown=is_progress_shown(trainer),
            rank_min=self.rank_min,
            **self.limits,
        )
        texts, images = padded_rows(found.texts, len(table.texts)), padded_rows(found.images, len(table.images))
        changed = int((texts != table.texts).sum()) + int((images != table.images).sum())
        self._unlogged = {
            "mining/encode_seconds": between - start,
            "mining/search_seconds": time.perf_counter() - between,
            "mining/gap": found.gap,
            "mining/rejected_share": found.rejected_share,
            "mining/changed_share": changed / (texts.numel() + images.numel()),
        }
        table.publish(texts, images)
        if self.inject == "embeddings":
            self._embed(encoded.image, encoded.text)

    def _embed(self, image: Tensor, text: Tensor) -> None:
        table = self._table()
        self.embedded = EmbeddedNegatives(
            image,
            text,
            table.texts.clone(),
            table.images.clone(),
            self._pairs().text_image_id[: len(text)],
            coupled_ranks=self.coupled_ranks,
            seed=self.seed,
        )

    def _log(self, pl_module: L.LightningModule) -> None:
        if self._unlogged:
            pl_module.log_dict(self._unlogged, on_step=False, on_epoch=True, sync_dist=True)
        self._unlogged = {}

    def _pairs(self) -> ImageTextDataset:
        if self.pairs is None:
            raise RuntimeError("Expected to be attached to a Trainer that fits; nothing was mined yet.")
        return self.pairs

    def _table(self) -> NegativeTable:
        if self.table is None:
            raise RuntimeError("Expected to be attached to a Trainer that fits; nothing was mined yet.")
        return self.table


def fingerprint(pairs: ImageTextDataset) -> str:
    """Return what tells one training set from another: its texts, and which image each belongs to."""
    digest = hashlib.blake2b(digest_size=16)
    for text in pairs.texts:
        digest.update(text.encode() + b"\0")
    digest.update(pairs.text_image_id.numpy().tobytes())
    return digest.hexdigest()
