"""Negatives from a momentum memory bank, drawn so that likely false ones are rare."""

import inspect
from collections.abc import MutableMapping
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_itm.callbacks._strategies import check_whole_weights
from lightning_itm.checks import check_choice
from lightning_itm.embeddings import EmbeddingPairs
from lightning_itm.functional.false_negatives import Weighting
from lightning_itm.memory_bank.candidates import MemoryCandidates
from lightning_itm.memory_bank.false_negative_sampler import FalseNegativeSampler
from lightning_itm.memory_bank.figure import plot_similarities
from lightning_itm.memory_bank.momentum_encoder import MomentumEncoder, check_momentum
from lightning_itm.memory_bank.queue import MemoryBank

CHECKPOINT_KEY = "false_negative_elimination"


class FalseNegativeElimination(Callback):
    """Compare each batch with thousands of earlier pairs, and rarely with those that match in truth (FNE).

    A slow copy of the module embeds each batch; the embeddings of the last ``queue_size`` pairs stay in a queue. The losses
    find both in the batch: ``TripletLoss`` draws its negatives there, one an anchor, ``QuintupletLoss`` those of its online
    term; ``InfoNCELoss`` and ``SigmoidLoss`` take them all as further, weighed candidates (ours), so that the other pairs of
    the batch are there twice, and their loss is of another size from ``start_epoch`` on. Nothing is added to the module.

    Args:
        queue_size: Pairs kept, of all processes; at least one global batch.
        momentum: Share of the old weights that the slow copy keeps at an optimizer step.
        start_epoch: The first epoch with candidates from memory; before, the batch is all there is.
        prior: Share of candidates that match though they belong to another image.
        sharpness: See :class:`~lightning_itm.FalseNegativeSampler` for this and the next five.
        threshold: The posterior of a likely match.
        min_count: Positives counted before posteriors are used.
        weighting: What likely matches weigh.
        monotone: Let the posterior never fall as the similarity rises.
        cut_down: Below which similarity candidates weigh nothing.
        positive: ``"momentum"``: the positives are embeddings of the slow copy, as published, and gradient flows through the
            anchor alone, so that a locked tower leaves one direction without any; ``"online"``: those of the batch, with
            gradient (ours). Hinges only.
        fill_during_warmup: Fill the queue in the epochs before ``start_epoch`` too (ours).
        seed: Of the draws.

    Logs ``memory/fill``, ``memory/positive_mean``, ``memory/positive_std``, ``memory/negative_mean``, ``memory/negative_std``,
    ``memory/num_positives``; the loss logs ``train/mean_posterior``, ``train/false_negative_rate`` and
    ``train/fallback_fraction``.

    Raises:
        ValueError: An argument out of its range; a batch larger than the queue; embeddings that are not finite, at a logging
            step or at the end of the epoch; a checkpoint with another queue.
        MisconfigurationException: A module that is no ``DualEncoder``, a loss without ``memory``, a second callback of this
            kind, or a strategy that shards the weights.

    References:
        *Your Negative May not Be True Negative: Boosting Image-Text Matching with False Negative Elimination*,
        arXiv 2308.04380 (2023). Its slow copies are in train mode, and its queue starts with random vectors.
    """

    def __init__(
        self,
        queue_size: int = 8192,
        momentum: float = 0.995,
        *,
        start_epoch: int = 1,
        prior: float = 1e-4,
        sharpness: float = 0.5,
        threshold: float = 1e-3,
        min_count: int = 200,
        weighting: Weighting = "exp",
        monotone: bool = False,
        cut_down: Literal["global", "per_anchor", "off"] = "global",
        positive: Literal["momentum", "online"] = "momentum",
        fill_during_warmup: bool = False,
        seed: int = 0,
    ) -> None:
        for name, value, least in (("queue_size", queue_size, 1), ("start_epoch", start_epoch, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"Expected `{name}` to be an integer of at least {least}, got {value}.")
        check_momentum(momentum)
        check_choice("positive", positive, ("momentum", "online"))
        self.queue_size, self.momentum, self.start_epoch = queue_size, momentum, start_epoch
        self.positive, self.fill_during_warmup = positive, fill_during_warmup
        self.sampler = FalseNegativeSampler(
            prior=prior,
            sharpness=sharpness,
            threshold=threshold,
            min_count=min_count,
            weighting=weighting,
            monotone=monotone,
            cut_down=cut_down,
            seed=seed,
        )
        self.encoder: MomentumEncoder | None = None
        self.bank: MemoryBank | None = None
        self._is_fitting, self._is_checked, self._is_told = False, False, False
        self._restored: dict[str, Any] | None = None
        self._incoming: EmbeddingPairs | None = None
        self._optimizer_steps = 0

    def is_active(self, epoch: int) -> bool:
        """Return whether the batches of ``epoch`` come with candidates from memory. Override for another schedule."""
        return epoch >= self.start_epoch

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check what the callback needs."""
        self._is_fitting = stage == "fit"
        if not self._is_fitting:
            return
        check_whole_weights(trainer, "the slow copy is of the whole module")
        if not hasattr(pl_module, "embed"):
            raise MisconfigurationException(
                f"Expected a `DualEncoder`, got {type(pl_module).__name__}: the slow copy is asked to `embed` batches."
            )
        if sum(isinstance(other, FalseNegativeElimination) for other in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise MisconfigurationException("Expected one `FalseNegativeElimination`, got several. Keep one.")
        loss = getattr(pl_module, "loss", None)
        if loss is not None and not _takes_memory(loss):
            raise MisconfigurationException(
                f"Expected a loss that takes `memory`, got {type(loss).__name__}. Use TripletLoss, QuintupletLoss, "
                "InfoNCELoss, SigmoidLoss or a subclass of `PairLoss`."
            )
        epochs = range(trainer.max_epochs or 0)
        if epochs and not trainer.fast_dev_run and not any(map(self.is_active, epochs)):  # type: ignore[attr-defined]
            rank_zero_warn(
                f"With `start_epoch={self.start_epoch}` and `max_epochs={trainer.max_epochs}`, no batch is ever compared with "
                "the memory bank. For a run of one epoch, set `start_epoch=0`."
            )
        self._restored, self.encoder, self.bank, self._is_checked, self._is_told = None, None, None, False, False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy the module, or go on with the copy of a checkpoint."""
        restored, self._restored = self._restored, None
        self.encoder = MomentumEncoder(pl_module, self.momentum)
        self.encoder.module.trainer = trainer  # type: ignore[assignment]  # a module may ask for the epoch
        self.sampler.to(pl_module.device, torch.float32 if pl_module.device.type == "mps" else torch.float64)
        if restored is None:
            self.sampler.start_step(-1, 0)
            return
        self.encoder.module.load_state_dict(restored["encoder"], strict=pl_module.strict_loading)
        self.sampler.load_state_dict(restored["sampler"])
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
        everything = _in_order(pairs.gather(), trainer.world_size)
        bank = self._bank(everything)
        bank.check(everything)
        self._is_checked = True  # at the fit's first batch, which need not be an active one
        if is_active or self.fill_during_warmup:
            self._incoming = everything
        if is_active:
            self.sampler.start_step(trainer.current_epoch, batch_idx)
            positive = pairs if self.positive == "momentum" else None
            batch["memory"] = MemoryCandidates(*bank.with_batch(everything), positive, self.sampler)

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

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise if an embedding was not finite; between steps, no one would wait for the answer."""
        self._check_finite(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the device; a checkpoint can be saved and the queue plotted after a fit, too."""
        if stage == "fit":
            for part in (self.encoder, self.bank, self.sampler):
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
        fit = self.sampler.statistics.fit()
        values = {
            "fill": bank.fill(),
            "positive_mean": fit.positive_mean,
            "positive_std": fit.positive_var.sqrt(),
            "negative_mean": fit.negative_mean,
            "negative_std": fit.negative_var.sqrt(),
            "num_positives": self.sampler.statistics.count[0].clone(),
        }
        pl_module.log_dict({f"memory/{name}": value.float() for name, value in values.items()}, batch_size=batch_size)

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


def _in_order(pairs: EmbeddingPairs, world_size: int) -> EmbeddingPairs:
    """Undo the split of a ``DistributedSampler``, which deals the pairs out in turn: the queue is that of one process."""
    return EmbeddingPairs(
        *(
            part.unflatten(0, (world_size, -1)).transpose(0, 1).flatten(0, 1)
            for part in (pairs.image_embeddings, pairs.text_embeddings, pairs.image_id, pairs.text_id)
        )
    )


def _takes_memory(loss: Any) -> bool:
    parameters = inspect.signature(getattr(loss, "forward", loss)).parameters.values()
    return any(one.name == "memory" or one.kind is one.VAR_KEYWORD for one in parameters)
