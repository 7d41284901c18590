"""Hard negatives over the whole training set, mined with the model as it stands."""

from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import Dataset

from lightning_itm.callbacks._strategies import check_whole_weights
from lightning_itm.checks import check_choice
from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.mining.attach import attach_draws, clear_draws, detach_draws, pairs_to_mine
from lightning_itm.mining.embedded_negatives import EmbeddedNegatives
from lightning_itm.mining.figure import contact_sheet
from lightning_itm.mining.mine import check_at_least, mine_into
from lightning_itm.mining.negative_table import NegativeTable
from lightning_itm.mining.state import check_state, fingerprint


class OfflineHardNegativeMining(Callback):
    """Mine the hardest texts of each image, and the hardest images of each text, over the whole training set (AOQ).

    Before an epoch every image and every text is encoded once, with evaluation transforms, in eval mode and under the
    Trainer's precision, split over the ranks. Each pair of the epoch then comes with negatives drawn from what was mined.
    :class:`~lightning_itm.QuintupletLoss` is the loss for it. The other losses take the mined pairs as further candidates.

    Args:
        dataset: The set that is mined. Default: the datamodule's ``train_dataset``. Without a datamodule, give the
            :class:`~lightning_itm.HardNegativeDataset` that your train loader reads. An
            :class:`~lightning_itm.ImageTextDataset` or a :class:`~lightning_itm.ShardStream` are fine, too. Remote shards need
            ``inject="embeddings"``.
        texts_per_image: Most texts that are kept per image. Fewer are harder, and more often wrongly taken as negatives.
        images_per_text: Most images that are kept per text. The published ratio of the two is 5, the texts of an image.
        every_n_epochs: Mine anew after this many epochs. Raise it where mining takes long. ``None``: mine once, as published.
        start_epoch: The first epoch with mined negatives, from 0. Raise it for a model that starts from random weights.
        inject: ``"samples"``: negatives are loaded with their pair and encoded with gradient, so a step
            encodes three times as much. ``"embeddings"``: they come as the embeddings of the mining pass, at nearly no cost
            and without gradient. The second is not in the paper.
        coupled_ranks: Draw one rank for both text and image, as published. False: draw two, which gives more combinations.
        rank_min: Leave out this many of the hardest, which are the likeliest false negatives. Typical: 0 to 10. This guard and
            the next three work as in :func:`~lightning_itm.functional.top_k_negatives`. Not in the paper.
        max_score: Drop negatives that are more similar than this. Default: keep all. Not in the paper.
        absolute_margin: Drop negatives that are more similar than the positive minus this. Default: keep all. The positive of
            an image is the mean over its texts. Not in the paper.
        relative_margin: Drop negatives above the positive less this fraction of its absolute value. Typical: 0.05.
            Default: keep all. Not in the paper.
        batch_size: Inputs that are encoded at once. No gradient is kept, so it can be larger than in training.
        num_workers: Worker processes that load the inputs to encode. Default: as many as the datamodule has.
        seed: Another seed gives other draws among the embeddings. Samples are drawn with the random numbers of the loader.

    Logs ``mining/encode_seconds``, ``mining/search_seconds``, ``mining/gap`` (mean similarity of the matching pairs minus that
    of the hardest negatives), ``mining/rejected_share`` (the fraction that a guard dropped) and ``mining/changed_share`` (the
    fraction of the table that differs from the one before).

    Raises:
        ValueError: if a count is too small, a checkpoint is of another training set, or an embedding is not finite.
        MisconfigurationException: if there are no pairs to mine, no loader reads the draws, or the weights are sharded.

    References:
        *Adaptive Offline Quintuplet Loss for Image-Text Matching*, ECCV 2020, arXiv 2003.03669. It mines once, with a model
        that was trained before. Mining in each epoch is not in the paper.
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
        check_at_least(1, texts_per_image=texts_per_image, images_per_text=images_per_text, batch_size=batch_size)
        check_at_least(1, every_n_epochs=every_n_epochs)
        check_at_least(0, start_epoch=start_epoch, rank_min=rank_min)
        check_choice("inject", inject, ("samples", "embeddings"))
        self.dataset = dataset
        self.texts_per_image, self.images_per_text = texts_per_image, images_per_text
        self.every_n_epochs, self.start_epoch = every_n_epochs, start_epoch
        self.inject, self.coupled_ranks = inject, coupled_ranks
        margins = {"absolute_margin": absolute_margin, "relative_margin": relative_margin}
        self.guards: dict[str, Any] = {"rank_min": rank_min, "max_score": max_score, **margins}
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.pairs: ImageTextDataset | None = None
        self.table: NegativeTable | None = None
        self.mined_embeddings: EmbeddedNegatives | None = None
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
        # Here, because the datamodule's own `setup` is done by now, and the train loader is made after it.
        self._is_fitting = stage == "fit"
        if not self._is_fitting:
            return
        check_whole_weights(trainer, "mining encodes with the whole module")
        source = self.dataset, trainer.datamodule  # type: ignore[attr-defined]
        self.pairs = pairs = pairs_to_mine(*source)
        counts = {"texts_per_image": self.texts_per_image, "images_per_text": self.images_per_text}
        self.table = NegativeTable(len(pairs.images), len(pairs.texts), **counts)
        self.table.is_pending = True  # a fit's first workers may ask before `on_fit_start`, and wait
        self._epoch, self._is_finished, self._restored, self.mined_embeddings = 0, False, None, None
        if self.inject == "embeddings":
            clear_draws(*source)
        else:
            attach_draws(*source, self.table, coupled_ranks=self.coupled_ranks)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the datamodule as it was, and no file behind. The table stays, to be looked at."""
        if stage == "fit" and self.table is not None:
            detach_draws(self.dataset, trainer.datamodule, self.table)  # type: ignore[attr-defined]
            self.table.remove()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mine for the first epoch, or go on with the restored table."""
        # Checkpoints are restored by now. `on_train_epoch_start` is too late: workers load the first batches before it.
        table, restored, self._restored = _attached(self.table), self._restored, None
        self._epoch = 0 if restored is None else int(restored["epoch"]) + bool(restored["is_finished"])
        if trainer.limit_train_batches == 0:
            table.is_pending = False
        elif self._epoch != trainer.max_epochs and self._has_to_mine(self._epoch, restored):
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
        """Log the first mining."""
        self._log(pl_module)  # in `on_fit_start`, where it was done, Lightning takes no logs

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what was mined for this epoch."""
        self._log(pl_module)  # at its start, so that the numbers stand beside those of the epoch they are for

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put the drawn embeddings into the batch."""
        # Here the batch is on the device already. With samples it came with its negatives from the loader.
        if self.mined_embeddings is not None:
            batch["hard"] = self.mined_embeddings.draw(batch["image_id"], batch["text_id"], trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember whether the epoch is finished."""
        # A checkpoint of the last batch is written before `on_train_epoch_end`. A run resumed from it skips that hook.
        self._is_finished = trainer.is_last_batch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mine for the next epoch, if there is one."""
        # At the end and not at the next start: by then workers have loaded the first batches of that epoch.
        epoch = trainer.current_epoch + 1
        if epoch <= self._epoch or epoch == trainer.max_epochs:
            return  # `trainer.should_stop` is no reason: with `min_epochs`, Lightning goes on
        self._epoch, self._is_finished = epoch, False
        if self.is_due(epoch):
            self._mine(trainer, pl_module)

    def plot(self, n: int = 8, *, num_negatives: int = 4, seed: int = 0) -> Any:
        """Draw some pairs with the hardest texts and images that were mined for them, as a matplotlib figure.

        Args:
            n: Number of pairs that are drawn, taken at random.
            num_negatives: Number of texts and images shown per pair, the hardest first.
            seed: Another seed shows other pairs.
        """
        table = _attached(self.table)
        return contact_sheet(_attached(self.pairs), table, n, num_negatives=num_negatives, seed=seed)

    def state_dict(self) -> dict[str, Any]:
        """Return the table, the embeddings where they are injected, and which epoch they are for."""
        if self.table is None:
            return {}
        mined = self.mined_embeddings
        return {
            "texts": self.table.texts.clone(),
            "images": self.table.images.clone(),
            "embeddings": mined and [mined.image_embeddings.cpu(), mined.text_embeddings.cpu()],
            "epoch": self._epoch,
            "is_finished": bool(self._is_finished),
            "fingerprint": fingerprint(_attached(self.pairs)),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Publish the table of a checkpoint, in a run that goes on.

        Raises:
            ValueError: if it is of another training set, or has other numbers of negatives.
        """
        # Lightning calls this hook in validate, test and predict as well.
        if self.table is None or not self._is_fitting or not state_dict:
            return
        check_state(state_dict, _attached(self.pairs), self.table)
        self._restored = state_dict
        if not (state_dict["is_finished"] and self.is_due(int(state_dict["epoch"]) + 1)):
            self.table.publish(state_dict["texts"], state_dict["images"])
        else:
            self.table.texts.copy_(state_dict["texts"])  # what the next mining is compared with
            self.table.images.copy_(state_dict["images"])

    def _mine(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        options = {"batch_size": self.batch_size, "num_workers": self.num_workers, **self.guards}
        table, pairs = _attached(self.table), _attached(self.pairs)
        encoded, self._unlogged = mine_into(table, pairs, trainer, pl_module, **options)
        if self.inject == "embeddings":
            self._embed(encoded.image_embeddings, encoded.text_embeddings)

    def _embed(self, image_embeddings: Tensor, text_embeddings: Tensor) -> None:
        table, text_image_id = _attached(self.table), _attached(self.pairs).text_image_id[: len(text_embeddings)]
        # Clones: the table is written anew at the end of the epoch, the draws of this epoch are of the earlier one.
        rows = table.texts.clone(), table.images.clone()
        options: dict[str, Any] = {"coupled_ranks": self.coupled_ranks, "seed": self.seed}
        self.mined_embeddings = EmbeddedNegatives(image_embeddings, text_embeddings, *rows, text_image_id, **options)

    def _log(self, pl_module: L.LightningModule) -> None:
        if self._unlogged:
            pl_module.log_dict(self._unlogged, on_step=False, on_epoch=True, sync_dist=True)
        self._unlogged = {}


def _attached(value: Any) -> Any:
    if value is None:
        raise RuntimeError("Expected to be attached to a Trainer that fits. Nothing was mined yet.")
    return value
