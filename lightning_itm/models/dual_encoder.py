"""The LightningModule that users subclass."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_itm.data.batch import check_batch
from lightning_itm.embeddings import EmbeddingPairs, HardNegatives
from lightning_itm.functional.similarity import unit_norm
from lightning_itm.losses.contrastive import InfoNCELoss
from lightning_itm.metrics.image_text_retrieval import ImageTextRetrieval
from lightning_itm.models.gradient_cache import check_chunk_size, encode_in_chunks, warn_of_batch_norm
from lightning_itm.models.optimization import warmup_cosine
from lightning_itm.randomness import part_random_streams, random_streams, restore_random_streams

LOSS_INPUTS = ("memory", "hard", "selective")
"""What callbacks may put into a batch for the loss, beside the pairs."""


class DualEncoder(L.LightningModule):
    """Train two encoders so that matching images and texts are close. Subclass it and override the two ``encode_`` methods.

    Validation and test report recall at K of both directions over the whole set (``val/i2t_r1`` … ``val/t2i_r10``,
    ``val/rsum``) and ranks; training logs the loss and its diagnostics (``train/loss``, ...).

    A checkpoint holds the state of the random streams, so that a resumed run draws what the uninterrupted one would have.

    Args:
        loss: Called as ``loss(pairs, candidates)``; returns a dict with ``"loss"``. Default: :class:`InfoNCELoss`.
        learning_rate: Of AdamW, after the warm-up. The default is for fine-tuning; from scratch, try 5e-4.
        weight_decay: Of AdamW. Norms, biases and ``logit_scale`` are exempt.
        warmup_steps: Optimizer steps over which the learning rate rises; a cosine takes it to zero from there. A run that
            is shorter gets a warning.
        chunk_size: The most images, or texts, encoded at once. The gradient is that of the whole batch, the memory that of a
            chunk, which is encoded again in the backward pass (``models/gradient_cache.py``). BatchNorm in training mode
            normalises over chunks, and takes each into its running statistics twice: a fit warns of it. ``None``: all at once.

    Raises:
        ValueError: A negative argument; a ``chunk_size`` that is no positive integer.
        TypeError: The loss is no module.

    Example:
        >>> class Linear(DualEncoder):
        ...     def __init__(self, **kwargs):
        ...         super().__init__(**kwargs)
        ...         self.image_encoder, self.text_encoder = nn.Linear(8, 4), nn.Linear(6, 4)
        ...     def encode_image(self, image): return self.image_encoder(image)
        ...     def encode_text(self, text): return self.text_encoder(text)
        >>> ids = torch.arange(3)
        >>> batch = {"image": torch.ones(3, 8), "text": torch.ones(3, 6), "image_id": ids, "text_id": ids}
        >>> Linear().training_step(batch, 0)  # all alike: one of three
        tensor(1.0986, grad_fn=<DivBackward0>)
    """

    def __init__(
        self,
        loss: nn.Module | None = None,
        *,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.1,
        warmup_steps: int = 100,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        settings = {"learning_rate": learning_rate, "weight_decay": weight_decay, "warmup_steps": warmup_steps}
        for name, value in settings.items():
            if value < 0:
                raise ValueError(f"Expected `{name}` not to be negative, got {value}.")
        if loss is not None and not isinstance(loss, nn.Module):
            raise TypeError(f"Expected `loss` to be a torch.nn.Module, got {type(loss).__name__}.")
        check_chunk_size(chunk_size)
        self.save_hyperparameters(*settings, "chunk_size")  # by name: modules among a subclass's arguments stay out
        self.learning_rate, self.weight_decay, self.warmup_steps = learning_rate, weight_decay, warmup_steps
        self.chunk_size = chunk_size
        self.loss = InfoNCELoss() if loss is None else loss
        self._metrics: dict[tuple[str, int], ImageTextRetrieval] = {}
        self._restored_rng: dict[str, Any] | None = None

    def encode_image(self, image: Any) -> Tensor:
        """Return one vector an image, `(pairs, dim)`, of any length. Override."""
        raise NotImplementedError(
            f"Override `encode_image` in {type(self).__name__}: one vector (pairs, dim) an image."
        )

    def encode_text(self, text: Any) -> Tensor:
        """Return one vector a text, `(pairs, dim)`, of any length. Override."""
        raise NotImplementedError(f"Override `encode_text` in {type(self).__name__}: one vector (pairs, dim) a text.")

    def towers(self) -> dict[str, nn.Module]:
        """Return the parts whose gradients are watched apart: ``image_encoder`` and ``text_encoder``, if there are, or all."""
        found = {name: getattr(self, f"{name}_encoder", None) for name in ("image", "text")}
        modules = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
        return modules if len(modules) == 2 else {"model": self}

    def embed(self, batch: Any) -> EmbeddingPairs:
        """Encode a batch; unit-norm, in float32 whatever the autocast dtype.

        Raises:
            TypeError: The batch is no dict.
            ValueError: A key is missing, or the two encoders do not return vectors of one width.
        """
        check_batch(batch)
        image, text = self._unit_vectors("image", batch["image"]), self._unit_vectors("text", batch["text"])
        return EmbeddingPairs(image, text, batch["image_id"], batch["text_id"])

    def embed_hard_negatives(self, hard: Mapping[str, Any]) -> HardNegatives:
        """Encode the mined negatives of a batch, with gradient.

        Args:
            hard: ``batch["hard"]`` as :class:`~lightning_itm.HardNegativeDataset` fills it: images and texts before the
                encoders, row by row for the pairs of the batch.
        """
        return HardNegatives(
            text_embeddings=self._unit_vectors("text", hard["text"]),
            image_of_text_embeddings=self._unit_vectors("image", hard["image_of_text"]),
            image_id_of_text=hard["image_id_of_text"],
            image_embeddings=self._unit_vectors("image", hard["image"]),
            text_of_image_embeddings=self._unit_vectors("text", hard["text_of_image"]),
            image_id=hard["image_id"],
        )

    def forward(self, batch: Any) -> EmbeddingPairs:
        """Encode a batch."""
        return self.embed(batch)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> EmbeddingPairs | dict[str, Tensor]:
        """Encode a batch of pairs, or one of images or texts alone: then a dict of unit vectors and ids."""
        alone = [kind for kind in ("image", "text") if kind in batch and f"{kind}_id" in batch]
        if len(alone) != 1:
            return self.embed(batch)
        (kind,) = alone
        return {**batch, kind: self._unit_vectors(kind, batch[kind])}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the loss of a batch, against the candidates of all ranks."""
        pairs = self.embed(batch)
        inputs = {name: batch[name] for name in LOSS_INPUTS if name in batch}
        if isinstance(inputs.get("hard"), Mapping):  # samples; embeddings need no further forward pass
            inputs["hard"] = self.embed_hard_negatives(inputs["hard"])
        outputs: dict[str, Tensor] = self.loss(pairs, pairs.gather(), **inputs)
        if not isinstance(outputs, dict) or "loss" not in outputs:
            raise TypeError(f"Expected the loss to return a dict with 'loss', got {type(outputs).__name__}.")
        if self._trainer is not None:  # a test may hand in a batch without a Trainer
            # Nothing on the progress bar: it would wait for the device at every step.
            self.log_dict({f"train/{name}": value.detach() for name, value in outputs.items()}, batch_size=len(pairs))
        return outputs["loss"]

    def configure_retrieval(self, stage: str) -> ImageTextRetrieval:
        """Return the metric of ``stage`` (``"val"`` or ``"test"``). Override for other K, or folds."""
        return ImageTextRetrieval()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take a batch into the metric of its loader."""
        self._metric("val", dataloader_idx).update(self.embed(batch))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take a batch into the metric of its loader."""
        self._metric("test", dataloader_idx).update(self.embed(batch))

    def on_validation_epoch_start(self) -> None:
        """Start anew, also after a validation that broke off."""
        self._reset_metrics("val")

    def on_test_epoch_start(self) -> None:
        """Start anew, also after a test that broke off."""
        self._reset_metrics("test")

    def on_validation_epoch_end(self) -> None:
        """Log retrieval over the whole validation set."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log retrieval over the whole test set."""
        self._log_metrics("test")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the groups of AdamW: no decay on norms, biases and ``logit_scale``. Override for others, or other rates.

        Raises:
            ValueError: Nothing is trained.
        """
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not trained:
            raise ValueError(
                "Expected a parameter that is trained, got none: all are frozen. Leave one tower unlocked."
            )
        return [
            {"params": [parameter for parameter in trained if parameter.ndim >= 2]},
            {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
        ]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW over :meth:`parameter_groups`, with warm-up and cosine."""
        optimizer = torch.optim.AdamW(self.parameter_groups(), lr=self.learning_rate, weight_decay=self.weight_decay)
        total, warmup = self.trainer.estimated_stepping_batches, self.warmup_steps
        if 0 < total <= warmup:
            rank_zero_warn(
                f"The run has {total} optimizer steps and `warmup_steps={warmup}`: the learning rate never reaches "
                f"{self.learning_rate}. Lower `warmup_steps`."
            )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(warmup, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the random streams: Lightning does not."""
        checkpoint["rng"] = random_streams()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the random streams of a resumed run until training starts: the sanity check would use them up."""
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self._restored_rng = checkpoint.get("rng")
            datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
            for name in getattr(datamodule, "earlier_names", ()):
                if name in checkpoint:  # Lightning looks for the present name alone
                    datamodule.load_state_dict(checkpoint[name])

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights; say so if they come with another loss."""
        theirs = {name for name in state_dict if name.startswith("loss.")}
        ours = {f"loss.{name}" for name in self.loss.state_dict()}
        if strict and theirs != ours:
            raise RuntimeError(
                f"Expected the weights of {type(self.loss).__name__}, {sorted(ours)}, got {sorted(theirs)}: another loss was "
                "trained. Pass it, as in `load_from_checkpoint(path, loss=...)`, or `strict=False` to go on with this one."
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def on_train_start(self) -> None:
        """Go on with the random streams of the checkpoint, and say where chunks change the result."""
        warn_of_batch_norm(self, self.chunk_size)
        if self._restored_rng is not None:
            restore_random_streams(self._restored_rng)
            part_random_streams(self.global_rank)
            self._restored_rng = None

    def _unit_vectors(self, kind: str, inputs: Any) -> Tensor:
        return unit_norm(encode_in_chunks(getattr(self, f"encode_{kind}"), inputs, self.chunk_size))

    def _metric(self, stage: str, dataloader_idx: int) -> ImageTextRetrieval:
        key = stage, dataloader_idx
        if key not in self._metrics:
            self._metrics[key] = self.configure_retrieval(stage).to(self.device)
        return self._metrics[key]

    def _log_metrics(self, stage: str) -> None:
        for (of_stage, index), metric in self._metrics.items():
            if of_stage == stage and metric.update_called:
                prefix = stage if index == 0 else f"{stage}_{index}"
                # Equal on all ranks already; sync_dist says so to Lightning.
                self.log_dict({f"{prefix}/{name}": value for name, value in metric.compute().items()}, sync_dist=True)
                metric.reset()  # and frees the embeddings

    def _reset_metrics(self, stage: str) -> None:
        for (of_stage, _), metric in self._metrics.items():
            if of_stage == stage:
                metric.reset()
