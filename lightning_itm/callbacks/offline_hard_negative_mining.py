"""Hard negatives over the whole training set, mined with the model as it stands."""

from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.utils.data import Dataset

from lightning_itm.callbacks._figures import log_figure
from lightning_itm.callbacks._strategies import check_reachable_weights
from lightning_itm.checks import check_at_least
from lightning_itm.data.position import epoch_to_resume
from lightning_itm.embeddings import RETURN_EMBEDDINGS
from lightning_itm.mining.figure import ShowsMined
from lightning_itm.mining.hard_negative_dataset import pairs_to_mine
from lightning_itm.mining.mine import Mining
from lightning_itm.mining.training_embeddings import step_embeddings
from lightning_itm.mining.ways import check_search, check_split, check_ways
from lightning_itm.mining.written import check_table, make_mining


class OfflineHardNegativeMining(ShowsMined, Callback):
    """Mine the hardest texts of each image, and the hardest images of each text, over the whole training set (AOQ).

    Before an epoch every image and every text is encoded once, with evaluation transforms, in eval mode and under the
    Trainer's precision, split over the ranks. What was mined reaches the training steps in one of three ways (``inject``).
    A text that equals one of an image's own captions is none of its negatives (``equal_captions`` of the dataset).

    Args:
        dataset: The set that is mined. Default: the datamodule's ``train_dataset``. Without a datamodule, give the
            :class:`~lightning_itm.HardNegativeDataset` that your train loader reads. An
            :class:`~lightning_itm.ImageTextDataset` or a :class:`~lightning_itm.ShardStream` are fine, too. Remote shards need
            ``inject="embeddings"``.
        texts_per_image: Most texts that are kept per image. Fewer are harder, and more often wrongly taken as negatives.
        images_per_text: Most images that are kept per text. The published ratio of the two is 5, the texts of an image.
        every_n_epochs: Mine anew after this many epochs. Raise it where mining takes long. ``None``: mine once, as published.
        start_epoch: The first epoch with mined negatives, from 0. Raise it for a model that starts from random weights.
        inject: ``"samples"``, as published: negatives are loaded with their pair and encoded with gradient, so a step encodes
            three times as much. Use :class:`~lightning_itm.QuintupletLoss`, or another loss, which takes them as further
            candidates. ``"embeddings"``: they come as embeddings of the mining pass, at nearly no cost and without gradient.
            ``"batches"``: pairs that are hard for each other share a batch, each pair once per epoch, with any loss and at no
            cost in the steps. See :func:`~lightning_itm.mining.compose_batches`. The last two are not in the paper.
        encode: ``"pass"``: encode the whole set before the epoch. ``"training"``: mine the embeddings that the training steps
            of the last epoch computed, which costs only the search. The first epoch then has no mined negatives. It keeps two
            float16 vectors per pair on the device, and can't be used with ``inject="embeddings"``. Not in the paper.
        group_size: Number of pairs that are hard for each other, with ``inject="batches"``. It must divide the pairs per batch
            on all ranks together. Typical: 4. Try 16 on a large set of fine-grained items.
        coupled_ranks: Draw one rank for both text and image, as published. False: draw two, which gives more combinations.
        rank_min: Leave out this many of the hardest, which are the likeliest false negatives. Typical: 0 to 10. This guard and
            the next three work as in :func:`~lightning_itm.functional.top_k_negatives`. Not in the paper.
        max_score: Drop negatives that are more similar than this. Default: keep all. Not in the paper.
        absolute_margin: Drop negatives that are more similar than the positive minus this. Default: keep all. The positive of
            an image is the mean over its texts. Not in the paper.
        relative_margin: Drop negatives above the positive less this fraction of its absolute value. None keeps all. Default:
            0.05 with ``inject="batches"``, and None otherwise. Not in the paper.
        batch_size: Inputs that are encoded at once. No gradient is kept, so it can be larger than in training.
        num_workers: Worker processes that load the inputs to encode. Default: as many as the datamodule has.
        seed: Another seed gives other draws among the embeddings. Samples are drawn with the random numbers of the loader.
        table: A folder that ``lightning-itm mine`` or :class:`~lightning_itm.NegativeWriter` wrote for this training set, for
            example with a model that was trained before, as published. It is read once, and nothing is encoded or searched
            in training. Guards belong to that mining, and ``inject="embeddings"`` can't be used. Default: mine in training.
        split_embeddings: Let each process keep only the embeddings of its own part of the set, in half precision. Typical:
            False. Turn it on where the embeddings of the whole set do not fit on a device. The search is exact for the rounded
            embeddings. It can't be used with ``inject="embeddings"``, ``encode="training"`` or ``table``. Not in the paper.
        search: ``"exact"``, or ``"faiss"`` for sets where that takes too long: candidates come from an index of FAISS (extra
            ``[faiss]``), and are then compared exactly. Not in the paper.
        faiss_index: The index: a factory string of FAISS, and after a space what ``faiss.ParameterSpace`` sets for the search,
            such as ``"IVF4096,PQ64x4fs nprobe=64"``. Default: one that fits the size, such as ``"IVF4000,Flat nprobe=63"``.
        log_figures: After each mining, send :meth:`plot` to the loggers that take it: TensorBoard, W&B, MLflow and Comet.

    Logs ``mining/encode_seconds``, ``mining/search_seconds``, ``mining/gap`` (mean similarity of the matching pairs minus that
    of the hardest negatives), ``mining/rejected_share`` (the fraction that a guard dropped) and ``mining/changed_share`` (the
    fraction of the table that differs from the one before). With ``inject="batches"`` also ``mining/compose_seconds`` and
    ``mining/grouped_share`` (the fraction of pairs that share their group with another). With ``search="faiss"`` also
    ``mining/recall`` (the fraction of the exact search's table, guards included, that was found for a sample of anchors).

    Raises:
        ValueError: if a count is too small, groups do not fit into batches, a checkpoint or table is of another set, or an
            embedding is not finite.
        MisconfigurationException: if there are no pairs to mine, no batch would be reached, or the strategy is
            FSDP1, DeepSpeed or tensor parallel.

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
        inject: Literal["samples", "embeddings", "batches"] = "samples",
        encode: Literal["pass", "training"] = "pass",
        group_size: int = 4,
        coupled_ranks: bool = True,
        rank_min: int = 0,
        max_score: float | None = None,
        absolute_margin: float | None = None,
        relative_margin: float | Literal["auto"] | None = "auto",
        batch_size: int = 256,
        num_workers: int | None = None,
        seed: int = 0,
        table: str | Path | None = None,
        split_embeddings: bool = False,
        search: Literal["exact", "faiss"] = "exact",
        faiss_index: str | None = None,
        log_figures: bool = True,
    ) -> None:
        check_at_least(1, texts_per_image=texts_per_image, images_per_text=images_per_text, batch_size=batch_size)
        check_at_least(1, every_n_epochs=every_n_epochs, group_size=group_size)
        check_at_least(0, start_epoch=start_epoch, rank_min=rank_min)
        check_ways(inject, encode)
        if split_embeddings:
            check_split(inject, encode, table)
        check_search(search, faiss_index, split_embeddings=split_embeddings)
        guards = {"rank_min": rank_min, "max_score": max_score, "absolute_margin": absolute_margin}
        ways: dict[str, Any] = {"inject": inject, "encode": encode, "every_n_epochs": every_n_epochs}
        check_table(table, **ways, guards={**guards, "relative_margin": relative_margin, "search": search})
        if relative_margin == "auto":
            relative_margin = 0.05 if inject == "batches" else None
        self.dataset, self.start_epoch, self.folder = dataset, start_epoch, table
        self.every_n_epochs = every_n_epochs if table is None else None  # read once
        self.inject, self.encode, self.log_figures = inject, encode, log_figures
        self._counts = {"texts_per_image": texts_per_image, "images_per_text": images_per_text}
        self._ways = {"coupled_ranks": coupled_ranks, "seed": seed, "group_size": group_size}
        encoding = {"batch_size": batch_size, "num_workers": num_workers, "split_embeddings": split_embeddings}
        searching = {**guards, "relative_margin": relative_margin, "search": search, "faiss_index": faiss_index}
        self._options: dict[str, Any] = {**encoding, **searching}
        self._mining: Mining | None = None
        self._is_fitting = False

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
        if self.folder is None:
            check_reachable_weights(trainer, "mining encodes with the whole module")
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        pairs, ways = pairs_to_mine(self.dataset, datamodule), {"inject": self.inject, "encode": self.encode}
        counts: dict[str, Any] = {"counts": self._counts, "ways": self._ways}
        self._mining = make_mining(self.folder, pairs, self.dataset, **ways, **counts)
        self._mining.injection.attach(datamodule, trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the datamodule as it was, and no file behind. The table stays, to be looked at."""
        if stage == "fit" and self._mining is not None:
            self._mining.injection.detach(trainer.datamodule)  # type: ignore[attr-defined]
            self._mining.table.remove()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the datamodule as it was."""
        if self._is_fitting:
            self.teardown(trainer, pl_module, "fit")  # Lightning itself does not call it after an exception

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember where the run goes on, also with a checkpoint of a run without this callback."""
        # `trainer.current_epoch` is restored only after `on_fit_start`, where the answer is needed.
        if self._mining is not None and self._is_fitting:
            self._mining.first_epoch = epoch_to_resume(checkpoint)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mine for the first epoch, or go on with the restored table."""
        # Checkpoints are restored by now. `on_train_epoch_start` is too late: workers load the first batches before it.
        self._attached().injection.announce()
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._begin(trainer, pl_module)

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        mining = self._attached()
        epoch = trainer.current_epoch if mining.first_epoch is None else mining.first_epoch
        has_all = mining.resume(pl_module.device)
        has_steps = trainer.limit_train_batches != 0 and epoch != trainer.max_epochs
        if has_steps and (mining.progress.is_before(epoch) or not has_all):
            mining.begin_epoch(trainer, pl_module, epoch, self.is_due, must_mine=not has_all, **self._options)
        mining.table.is_pending = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mine for the first epoch under FSDP2, and log the first mining."""
        # Strategies that shard the weights restore a checkpoint after `on_fit_start`. Until here, workers wait.
        if trainer.strategy.restore_checkpoint_after_setup:
            self._begin(trainer, pl_module)
        self._log(pl_module)  # in `on_fit_start`, where it was done, Lightning takes no logs

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mine for this epoch, unless that is done, and log what was mined."""
        # Here and not at the end of the last epoch. By now its checkpoint is written, so an error in mining costs no epoch,
        # and nothing is mined where `max_steps`, `max_time` or `trainer.should_stop` ends the run.
        mining = self._attached()
        if trainer.current_epoch > mining.progress.epoch:
            mining.begin_epoch(trainer, pl_module, trainer.current_epoch, self.is_due, **self._options)
        self._log(pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put what was mined into the batch, and ask the step for its embeddings if they are to be mined."""
        # Here the batch is on the device already. With samples it came with its negatives from the loader.
        mining = self._attached()
        mining.injection.to_batch(batch, trainer.current_epoch)
        if mining.training_embeddings is not None:
            batch[RETURN_EMBEDDINGS] = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the embeddings of the step, and remember whether the epoch is finished."""
        mining = self._attached()
        if mining.training_embeddings is not None and outputs:  # a step that returned None has none
            mining.training_embeddings.update(*step_embeddings(outputs))
        # A checkpoint of the last batch is written before `on_train_epoch_end`. A run resumed from it skips that hook.
        mining.progress.is_finished = trainer.is_last_batch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let workers wait that start before the next epoch is mined, which those of a new loader do."""
        # Otherwise, the next iterator is made after `on_train_epoch_start`.
        if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            self._attached().injection.announce(is_new=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let nobody wait: no epoch follows."""
        self._attached().table.is_pending = False

    def state_dict(self) -> dict[str, Any]:
        """Return what is mined, and which epoch it is for."""
        return {} if self._mining is None else self._mining.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Publish the table of a checkpoint, in a run that goes on.

        Raises:
            ValueError: if it is of another training set, or has other numbers of negatives.
        """
        # Lightning calls this hook in validate, test and predict as well.
        if self._mining is not None and self._is_fitting and state_dict:
            self._mining.load_state_dict(state_dict, self.is_due)

    def _log(self, pl_module: L.LightningModule) -> None:
        unlogged = self._attached().take_logs()
        pl_module.log_dict(unlogged, on_step=False, on_epoch=True, sync_dist=True)
        if self.log_figures and "mining/gap" in unlogged and self._attached().table.has_any:
            log_figure(pl_module.trainer, "mining/contact_sheet", self.plot)
