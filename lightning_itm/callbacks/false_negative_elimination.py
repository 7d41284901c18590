"""Negatives from a momentum memory bank, drawn so that likely false ones are rare."""

from collections.abc import MutableMapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_itm.callbacks._memory_setup import check_memory_fits
from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.memory_bank.agreement import Agreement
from lightning_itm.memory_bank.candidates import MemoryCandidates
from lightning_itm.memory_bank.diagnostics import memory_diagnostics
from lightning_itm.memory_bank.false_negative_sampler import FalseNegativeSampler
from lightning_itm.memory_bank.figure import plot_similarities
from lightning_itm.memory_bank.momentum_encoder import MomentumEncoder, check_momentum
from lightning_itm.memory_bank.queue import MemoryBank, in_order_of_one_process

CHECKPOINT_KEY = "false_negative_elimination"


class FalseNegativeElimination(Callback):
    """Use thousands of earlier pairs as extra negatives, and rarely those that probably match (FNE).

    In plain terms: 1. A slow copy of the model embeds each batch, too. 2. The embeddings of the last ``queue_size`` pairs stay
    in a queue, the memory bank. 3. The loss compares each anchor with the bank, in a term of its own. 4. A pair of the bank
    that probably matches the anchor (a false negative) weighs little or nothing, which the ``sampler`` decides.

    Use it to fine-tune a model that matches already, on a set that is large beside the batch. The bank fills from the first
    step on. By default it enters the loss once its embeddings agree with those of the live model, and leaves it, with a
    warning, where they no longer do: see :class:`~lightning_itm.memory_bank.Agreement`. Nothing is added to the module.

    Args:
        queue_size: Pairs in the bank, of all processes together, at least one global batch. Usual: 1,024 to 65,536, below the
            size of the training set. More pairs are more negatives, and older ones.
        momentum: How much of its old weights the slow copy keeps at an optimizer step. Usual: 0.99 for runs of some hundred
            steps, 0.999 for long ones.
        start_epoch: ``None``: the bank enters the loss once it agrees with the live model. Not in the paper. A number: it is
            in the loss from that epoch on, and the agreement is only logged. As published: 1.
        fill_during_warmup: With a ``start_epoch``, fill the queue in the epochs before it. False as published, where the first
            batches of that epoch meet an empty queue.
        sampler: How negatives are drawn and weighed: a :class:`~lightning_itm.FalseNegativeSampler`, the default one if left
            out. It is made for one callback, and keeps its statistics.

    Logs ``memory/fill``, ``memory/in_loss``, ``memory/live_in_stored`` and ``memory/stored_in_stored`` (the two ratios of the
    agreement), ``memory/cosine`` (of live and stored embedding of the same input), ``memory/positive_mean``,
    ``memory/positive_std``, ``memory/negative_mean``, ``memory/negative_std``, ``memory/num_positives``. The loss logs
    ``train/memory_cost``, ``train/mean_posterior``, ``train/false_negative_rate`` and ``train/fallback_fraction``.

    Raises:
        ValueError: if an argument is out of its range, a batch is larger than the queue, embeddings are not finite (found at a
            logging step or at the end of the epoch), or a checkpoint has another queue.
        TypeError: if ``sampler`` is no FalseNegativeSampler.
        MisconfigurationException: if the module is no ``DualEncoder``, the loss takes no ``memory``, there is a second
            callback of this kind, or the strategy shards the weights.

    References:
        *Your Negative May not Be True Negative: Boosting Image-Text Matching with False Negative Elimination*,
        arXiv 2308.04380 (2023). Its slow copies are in train mode, and its queue starts with random vectors. As published:
        ``FalseNegativeElimination(8224, 0.995, start_epoch=1, fill_during_warmup=False)`` with
        ``TripletLoss(memory="instead", reduction="sum")``.
    """

    def __init__(
        self,
        queue_size: int = 8192,
        momentum: float = 0.995,
        *,
        start_epoch: int | None = None,
        fill_during_warmup: bool = True,
        sampler: FalseNegativeSampler | None = None,
    ) -> None:
        for name, value, least in (("queue_size", queue_size, 1), ("start_epoch", start_epoch or 0, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"Expected `{name}` to be an integer of at least {least}, got {value}.")
        check_momentum(momentum)
        if sampler is not None and not isinstance(sampler, FalseNegativeSampler):
            raise TypeError(
                f"Expected `sampler` to be a FalseNegativeSampler, got {type(sampler).__name__}. Subclass it for another rule."
            )
        self.queue_size, self.momentum = queue_size, momentum
        self.start_epoch, self.fill_during_warmup = start_epoch, fill_during_warmup
        self.sampler = FalseNegativeSampler() if sampler is None else sampler
        self.agreement = Agreement()
        self.encoder: MomentumEncoder | None = None
        self.bank: MemoryBank | None = None
        self._is_fitting, self._is_checked, self._is_told, self._is_warned = False, False, False, False
        self._restored: dict[str, Any] | None = None
        self._incoming: EmbeddingPairs | None = None
        self._optimizer_steps = 0

    def is_active(self, epoch: int) -> bool:
        """Return whether the batches of ``epoch`` come with candidates from memory. Override for another schedule."""
        return self.start_epoch is None or epoch >= self.start_epoch

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check what the callback needs."""
        self._is_fitting = stage == "fit"
        if not self._is_fitting:
            return
        check_memory_fits(trainer, pl_module)
        self._warn_if_never_active(trainer)
        self._restored, self.encoder, self.bank, self.agreement = None, None, None, Agreement()
        self._is_checked, self._is_told, self._is_warned = False, False, False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy the module, or go on with the copy of a checkpoint."""
        restored, self._restored = self._restored, None
        self.encoder = MomentumEncoder(pl_module, self.momentum)
        self.encoder.module.trainer = trainer  # type: ignore[assignment]  # a module may ask for the epoch
        self.sampler.to(pl_module.device, torch.float32 if pl_module.device.type == "mps" else torch.float64)
        self.agreement.to(pl_module.device)
        if restored is None:
            self.sampler.start_step(-1, 0)
            return
        self.encoder.module.load_state_dict(restored["encoder"], strict=pl_module.strict_loading)
        self.sampler.load_state_dict(restored["sampler"])
        if "agreement" in restored:  # older checkpoints have none: it is followed anew from here
            self.agreement.load_state_dict(restored["agreement"])
        if restored["bank"] is not None:
            image = restored["bank"]["image"]
            self.bank = MemoryBank(*image.shape).to(image.dtype)  # or float64 would be rounded
            self.bank.load_state_dict(restored["bank"])

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Embed the batch with the slow copy, and put the candidates into it."""
        self._optimizer_steps, self._incoming = trainer.global_step, None
        is_active = self.is_active(trainer.current_epoch) or bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if self._is_checked and not (is_active or self.fill_during_warmup):
            return
        if not isinstance(batch, MutableMapping):
            raise TypeError(
                f"Expected the batch to be a dict, got {type(batch).__name__}. Let the dataset return dicts."
            )
        with trainer.precision_plugin.forward_context():
            pairs = self._encoder()(batch)
        everything = in_order_of_one_process(pairs.gather(), trainer.world_size)
        bank = self._bank(everything)
        bank.check(everything)
        self._is_checked = True  # at the fit's first batch, which need not be an active one
        if is_active or self.fill_during_warmup:
            self._incoming = everything
        if is_active:
            self.sampler.start_step(trainer.current_epoch, batch_idx)
            # A copy: what the loss observes in this step decides about the next one.
            is_in_loss = self.agreement.is_met.clone() if self.start_epoch is None else None
            candidates = bank.with_batch(everything)
            batch["memory"] = MemoryCandidates(*candidates, pairs, self.sampler, self.agreement, is_in_loss)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Enqueue the batch; after an optimizer step, let the slow copy follow."""
        if self._incoming is not None:
            bank = self._bank(self._incoming)
            bank.enqueue(self._incoming)
            if "memory" in batch:
                self._log(pl_module, bank, len(self._incoming))
                self._check_asked(pl_module)
            self._incoming = None
        if trainer.global_step > self._optimizer_steps:
            self._encoder().update(pl_module)
            every = trainer.log_every_n_steps if trainer.loggers else 0  # type: ignore[attr-defined]
            if every and trainer.global_step % every == 0:
                self._check_finite(trainer)
                self._check_agreement()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise if an embedding was not finite, and warn if the bank left the loss."""
        # Here, not after a step: the host would have to wait for the device.
        self._check_finite(trainer)
        self._check_agreement()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the device; a checkpoint can be saved and the queue plotted after a fit, too."""
        if stage == "fit":
            for part in (self.encoder, self.bank, self.sampler, self.agreement):
                if part is not None:
                    part.cpu()

    def plot(self) -> Any:
        """Draw the similarities in the queue, the two fitted densities, and the posterior.

        Returns:
            A matplotlib figure.

        Raises:
            RuntimeError: There is no queue yet.
        """
        if self.bank is None:
            raise RuntimeError("Expected a queue to draw, but no batch was put into one. Plot after, or in, a fit.")
        return plot_similarities(self.bank, self.sampler)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the slow copy, the queue and the statistics."""
        if self.encoder is not None:
            checkpoint[CHECKPOINT_KEY] = {
                "encoder": self.encoder.module.state_dict(),
                "bank": None if self.bank is None else self.bank.state_dict(),
                "sampler": self.sampler.state_dict(),
                "agreement": self.agreement.state_dict(),
                "version": 2,
                "queue_size": self.queue_size,
            }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what a run that goes on needs.

        Raises:
            ValueError: The checkpoint has a queue of another size.
        """
        restored = checkpoint.get(CHECKPOINT_KEY)
        if not self._is_fitting or restored is None:
            return
        if restored["queue_size"] != self.queue_size:
            raise ValueError(
                f"Expected a queue of {self.queue_size} pairs, got one of {restored['queue_size']} in the checkpoint. "
                f"Resume with `queue_size={restored['queue_size']}`, or start from the weights alone (`load_from_checkpoint`)."
            )
        self._restored = restored

    def _log(self, pl_module: L.LightningModule, bank: MemoryBank, batch_size: int) -> None:
        values = memory_diagnostics(bank, self.sampler, self.agreement, is_always_in=self.start_epoch is not None)
        pl_module.log_dict({f"memory/{name}": value.float() for name, value in values.items()}, batch_size=batch_size)

    def _warn_if_never_active(self, trainer: L.Trainer) -> None:
        epochs = range(max(trainer.max_epochs or 0, 0))
        if epochs and not trainer.fast_dev_run and not any(map(self.is_active, epochs)):  # type: ignore[attr-defined]
            rank_zero_warn(
                f"With `start_epoch={self.start_epoch}` and `max_epochs={trainer.max_epochs}`, no batch is ever compared with "
                "the memory bank. For a run of one epoch, set `start_epoch=0` or leave it out."
            )

    def _check_agreement(self) -> None:
        """Warn, once, where the bank left the loss. Called only where the host waits anyway."""
        if self.start_epoch is None and not self._is_warned and bool(self.agreement.was_lost):
            self._is_warned = True
            rank_zero_warn(
                "The memory bank has left the loss: its embeddings no longer agree with the live model (see "
                "`memory/live_in_stored` and `memory/stored_in_stored`). It comes back when they do. Lower the learning rate, "
                "or lower `momentum`, so that the slow copy follows faster."
            )

    def _check_finite(self, trainer: L.Trainer) -> None:
        if self.bank is not None and (refused := int(self.bank.num_refused)) > 0:
            raise ValueError(
                f"Expected finite embeddings, got {refused} pairs with NaN or infinity by epoch {trainer.current_epoch}, step "
                f"{trainer.global_step}. They are not in the queue; lower the learning rate, or clip gradients."
            )

    def _check_asked(self, pl_module: L.LightningModule) -> None:
        if not (self.sampler.was_asked or self._is_told):
            self._is_told = True
            rank_zero_warn(
                f"The memory bank is not used: nothing asked its sampler in `{type(pl_module).__name__}.training_step`. Pass "
                "`memory=batch['memory']` on to the loss."
            )

    def _bank(self, pairs: EmbeddingPairs) -> MemoryBank:
        if self.bank is None:
            self.bank = MemoryBank(self.queue_size, pairs.image_embeddings.shape[1])
        if (self.bank.image.dtype, self.bank.image.device) != (
            pairs.image_embeddings.dtype,
            pairs.image_embeddings.device,
        ):
            self.bank.to(pairs.image_embeddings.device, pairs.image_embeddings.dtype)
        return self.bank

    def _encoder(self) -> MomentumEncoder:
        if self.encoder is None:
            raise RuntimeError("Expected a slow copy; it is made in `on_fit_start`, which did not run.")
        return self.encoder
