"""Negatives from earlier batches, embedded by a slow copy of the model, with likely matches left out."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lightning_itm.callbacks._figures import log_figure
from lightning_itm.callbacks._memory_checkpoint import CHECKPOINT_KEY, check_memory_state, memory_state, restore_memory
from lightning_itm.callbacks._memory_checks import (
    check_arguments,
    check_finite,
    check_is_dict,
    check_memory_fits,
    warn_if_never_active,
    warn_of_lost_agreement,
    warn_of_unused_memory,
)
from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.memory_bank.agreement import Agreement
from lightning_itm.memory_bank.candidates import MemoryCandidates
from lightning_itm.memory_bank.diagnostics import memory_diagnostics
from lightning_itm.memory_bank.false_negative_sampler import FalseNegativeSampler
from lightning_itm.memory_bank.figure import plot_similarities
from lightning_itm.memory_bank.momentum_encoder import MomentumEncoder
from lightning_itm.memory_bank.queue import MemoryBank, in_order_of_one_process


class FalseNegativeElimination(Callback):
    """Use thousands of earlier pairs as extra negatives, and let those that probably match weigh less (FNE).

    In plain terms:

    1. A slow copy of the model embeds each batch, too.
    2. The embeddings of the last ``queue_size`` pairs stay in a queue, the memory bank.
    3. The loss compares each image and each text with the bank, in a term of its own.
    4. A pair of the bank that probably matches (a false negative) weighs less. With
       ``sampler=FalseNegativeSampler(weighting="drop")`` it is left out.

    Use it to fine-tune a model that matches already, on a training set that is much larger than a batch. The bank fills from
    the first step on. By default it enters the loss when its embeddings agree with those of the live model, which takes at
    least twenty steps. It leaves the loss, with a warning, if they no longer do. See
    :class:`~lightning_itm.memory_bank.Agreement`. The module itself gets no new weights or buffers.

    Args:
        queue_size: The number of pairs in the bank, of all processes together. Usual: 512 to 65,536, at least one global batch
            and below the size of the training set. A larger bank has more negatives, but older ones. Begin with the default.
            Where the model changes fast, a larger bank can do harm.
        momentum: The fraction of its old weights that the slow copy keeps at an optimizer step. Usual: 0.99 for runs of some
            hundred steps, 0.999 for long ones. Lower it if the bank does not enter the loss.
        start_epoch: The epoch from which on the bank is in the loss, counted from 0. The agreement is then only logged. As
            published: 1. Default: wait for the agreement instead of an epoch, which is not in the paper.
        fill_during_warmup: Fill the queue in the epochs before ``start_epoch``, too. Set it to False for runs as published,
            where the first batches of that epoch meet an empty queue. It has no effect without a ``start_epoch``.
        sampler: What draws and weighs negatives. Default: ``FalseNegativeSampler()``. Give a
            :class:`~lightning_itm.FalseNegativeSampler` with other arguments, one for each callback.
        log_figures: After each epoch, send :meth:`plot` to the loggers that take it: TensorBoard, W&B, MLflow and Comet.

    It logs ``memory/fill``, ``memory/in_loss``, the two ratios of the agreement (``memory/live_in_stored`` and
    ``memory/stored_in_stored``, about 1 when all is well), ``memory/cosine`` (between the live and the stored embedding of
    one input), and the similarities that the sampler has seen (``memory/positive_mean``, ``memory/positive_std``,
    ``memory/negative_mean``, ``memory/negative_std``, ``memory/num_positives``). The loss logs ``train/memory_cost``,
    ``train/mean_posterior``, ``train/false_negative_rate`` and ``train/fallback_fraction``.

    Raises:
        ValueError: if an argument is out of its range, a batch is larger than the queue, embeddings are not finite (found at a
            logging step or at the end of the epoch), or a checkpoint has another queue.
        TypeError: if ``sampler`` is no FalseNegativeSampler, or a batch is no dict.
        MisconfigurationException: if the module is no ``DualEncoder``, the loss takes no ``memory``, there is a second
            callback of this kind, or the strategy shards the weights.

    Example:
        >>> import lightning as L
        >>> from lightning_itm import FalseNegativeElimination
        >>> fne = FalseNegativeElimination(4096, momentum=0.99)
        >>> trainer = L.Trainer(callbacks=[fne], max_epochs=5, accelerator="cpu", logger=False)

    References:
        *Your Negative May not Be True Negative: Boosting Image-Text Matching with False Negative Elimination*,
        arXiv 2308.04380 (2023). Its slow copies are in train mode, and its queue starts with random vectors. As published:
        ``FalseNegativeElimination(8224, 0.995, start_epoch=1, fill_during_warmup=False, sampler=sampler)`` with
        ``sampler = FalseNegativeSampler(posterior="published")`` and ``TripletLoss(memory="instead", reduction="sum")``.
    """

    def __init__(
        self,
        queue_size: int = 2048,
        momentum: float = 0.995,
        *,
        start_epoch: int | None = None,
        fill_during_warmup: bool = True,
        sampler: FalseNegativeSampler | None = None,
        log_figures: bool = True,
    ) -> None:
        check_arguments(queue_size, momentum, start_epoch, sampler)
        self.queue_size, self.momentum = queue_size, momentum
        self.start_epoch, self.fill_during_warmup, self.log_figures = start_epoch, fill_during_warmup, log_figures
        self.sampler = FalseNegativeSampler() if sampler is None else sampler
        self.agreement = Agreement()
        self.encoder: MomentumEncoder | None = None
        self.bank: MemoryBank | None = None
        self._is_fitting = self._is_checked = self._is_told = self._is_warned = False
        self._restored: dict[str, Any] | None = None
        self._incoming: EmbeddingPairs | None = None
        self._optimizer_steps = 0

    def is_active(self, epoch: int) -> bool:
        """Tell whether the batches of an epoch come with candidates from the memory bank. Override for another schedule.

        Args:
            epoch: The number of the epoch, counted from 0.
        """
        return self.start_epoch is None or epoch >= self.start_epoch

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check what the callback needs, and forget an earlier fit."""
        # Here, before a checkpoint is loaded: `on_load_checkpoint` comes next, and needs to know that this is a fit.
        self._is_fitting = stage == "fit"
        if not self._is_fitting:
            return
        check_memory_fits(trainer, pl_module)
        warn_if_never_active(trainer, self.is_active, self.start_epoch)
        self._restored, self.encoder, self.bank, self.agreement = None, None, None, Agreement()
        self._is_checked, self._is_told, self._is_warned = False, False, False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy the module, or go on with the copy of a checkpoint."""
        # Here and not in `setup`: the weights of a checkpoint are loaded, and the module is on its device.
        restored, self._restored = self._restored, None
        self.encoder = MomentumEncoder(pl_module, self.momentum)
        self.encoder.module.trainer = trainer  # type: ignore[assignment]  # a module may ask for the epoch
        # Moments are float64, except on a Mac's GPU, which has no float64.
        self.sampler.to(pl_module.device, torch.float32 if pl_module.device.type == "mps" else torch.float64)
        self.agreement.to(pl_module.device)
        if restored is None:
            self.sampler.start_step(-1, 0)
        else:
            parts = restored, self.encoder, self.sampler, self.agreement
            self.bank = restore_memory(*parts, strict=pl_module.strict_loading)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Embed the batch with the slow copy, and put the candidates into it."""
        # Here: the batch is on the device, transformed, and the training step comes next.
        self._optimizer_steps, self._incoming = trainer.global_step, None
        is_active = self.is_active(trainer.current_epoch) or bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if self._is_checked and not (is_active or self.fill_during_warmup):
            return
        check_is_dict(batch)
        # Under the precision of the training step, so that live and stored embeddings differ by their weights alone.
        with trainer.precision_plugin.forward_context():
            pairs = self._encoder()(batch)
        everything = in_order_of_one_process(pairs.gather(), trainer.world_size)
        bank = self._bank(everything)
        bank.check(everything)
        self._is_checked = True  # at the fit's first batch, so that an error does not wait for the first active epoch
        if is_active or self.fill_during_warmup:
            self._incoming = everything
        if is_active:
            self.sampler.start_step(trainer.current_epoch, batch_idx)
            # A copy: what the loss observes in this step decides about the next one.
            is_in_loss = self.agreement.is_met.clone() if self.start_epoch is None else None
            parts = *bank.with_batch(everything), pairs, self.sampler, self.agreement, is_in_loss
            batch["memory"] = MemoryCandidates(*parts, caption_id=bank.captions_with_batch(everything))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Put the batch into the queue and, after an optimizer step, let the slow copy follow."""
        # Here, after the loss: the batch is a candidate of its own step already, and must not stand in the queue, too.
        if self._incoming is not None:
            bank = self._bank(self._incoming)
            bank.enqueue(self._incoming)
            if "memory" in batch:
                self._log(pl_module, bank, len(self._incoming))
                if not (self.sampler.was_asked or self._is_told):
                    self._is_told = True
                    warn_of_unused_memory(pl_module)
            self._incoming = None
        # With accumulated gradients, most batches make no step, and the weights are what they were.
        if trainer.global_step > self._optimizer_steps:
            self._encoder().update(pl_module)
            every = trainer.log_every_n_steps if trainer.loggers else 0  # type: ignore[attr-defined]
            if every and trainer.global_step % every == 0:
                self._check_state(trainer)  # the loggers make the host wait at this step anyway

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise if an embedding was not finite, warn if the bank left the loss, and log the figure."""
        # Here, for runs without a logger. After each step the host would have to wait for the device.
        self._check_state(trainer)
        if self.log_figures and self.bank is not None:
            log_figure(trainer, "memory/similarities", self.plot)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Move the queue, the slow copy and the statistics to the CPU, where they can be saved and plotted after a fit."""
        if stage == "fit":
            for part in (self.encoder, self.bank, self.sampler, self.agreement):
                if part is not None:
                    part.cpu()

    def plot(self) -> Any:
        """Draw which pairs of the queue the sampler takes for matches: :func:`~lightning_itm.memory_bank.plot_similarities`.

        Raises:
            RuntimeError: if there is no queue yet.
        """
        if self.bank is None:
            raise RuntimeError("Expected a queue to draw, but no batch was put into one. Plot after, or in, a fit.")
        return plot_similarities(self.bank, self.sampler)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the slow copy, the queue, the statistics and the agreement."""
        # Not by `state_dict`, whose key is the name of the class: a subclass can go on with the checkpoint.
        if self.encoder is not None:
            parts = self.encoder, self.bank, self.sampler, self.agreement
            checkpoint[CHECKPOINT_KEY] = memory_state(*parts, self.queue_size, trainer)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the state of a checkpoint until the fit starts.

        Raises:
            ValueError: if the checkpoint has a queue of another size.
        """
        restored = checkpoint.get(CHECKPOINT_KEY)
        if self._is_fitting and restored is not None:
            check_memory_state(restored, self.queue_size, trainer)
            self._restored = restored  # put in place in `on_fit_start`, where the slow copy is made

    def _log(self, pl_module: L.LightningModule, bank: MemoryBank, batch_size: int) -> None:
        values = memory_diagnostics(bank, self.sampler, self.agreement, is_always_in=self.start_epoch is not None)
        pl_module.log_dict({f"memory/{name}": value.float() for name, value in values.items()}, batch_size=batch_size)

    def _check_state(self, trainer: L.Trainer) -> None:
        """Raise if an embedding was not finite, and warn, once, if the bank left the loss. The host waits for the device."""
        if self.bank is not None:
            check_finite(trainer, self.bank)
        if self.start_epoch is None and not self._is_warned and bool(self.agreement.was_lost):
            self._is_warned = True
            warn_of_lost_agreement()

    def _bank(self, pairs: EmbeddingPairs) -> MemoryBank:
        if self.bank is None:
            self.bank = MemoryBank(self.queue_size, pairs.image_embeddings.shape[1])
        # Float64 stays float64. Nothing happens where device and dtype are those of the queue already.
        return self.bank.to(pairs.image_embeddings.device, pairs.image_embeddings.dtype)

    def _encoder(self) -> MomentumEncoder:
        if self.encoder is None:
            raise RuntimeError("Expected a slow copy, got None. It is made in `on_fit_start`. Call that first.")
        return self.encoder
