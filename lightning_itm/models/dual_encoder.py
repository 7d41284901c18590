"""The LightningModule that users subclass: a training step is a function of the batch."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_itm.data.batch import check_batch
from lightning_itm.embeddings import RETURN_EMBEDDINGS, EmbeddingPairs, HardNegatives
from lightning_itm.encoder_output import returning_vectors
from lightning_itm.export.exportable import Exportable
from lightning_itm.functional.similarity import unit_norm
from lightning_itm.metrics.image_text_retrieval import ImageTextRetrieval
from lightning_itm.models.gradient_cache import check_chunk_size, encode_in_chunks, warn_of_batch_norm
from lightning_itm.models.negatives_check import ChecksNegatives
from lightning_itm.models.optimization import decay_groups, warmup_cosine
from lightning_itm.models.resumable_module import ResumableModule
from lightning_itm.models.retrieval_metrics import RetrievalMetrics

LOSS_INPUTS = ("memory", "hard", "selective", "hard_captions")
"""The entries of a batch that are passed on to the loss if a callback has put them there."""


class DualEncoder(ResumableModule, ChecksNegatives, Exportable):
    """Train two encoders so that matching images and texts are close.

    In plain terms: subclass it, write :meth:`encode_image` and :meth:`encode_text`, and give it to a Lightning ``Trainer``.

    1. *Training* encodes a batch, compares all its images with all its texts, and logs the loss and what the loss reports
       about itself (``train/loss``, ...).
    2. *Validation and test* log recall at K in both directions over the whole set (``val/i2t_r1`` … ``val/t2i_r10``,
       ``val/rsum``), and ranks. The texts of one image stand side by side in a set, and the image is encoded once for them.
    3. *The optimizer* is AdamW with a warm-up and a cosine. Override :meth:`parameter_groups` or ``configure_optimizers``.
    4. *A checkpoint* holds the state of the random streams. A resumed run draws what the uninterrupted one would have drawn.

    Args:
        loss: The loss of a batch, a module that is called as ``loss(pairs, candidates)`` and returns a dict with ``"loss"``.
            Default: :class:`~lightning_itm.InfoNCELoss`, the loss of CLIP. A checkpoint makes one of ours again by itself.
        learning_rate: The highest learning rate, which the warm-up ends at. The default, 1e-5, is for fine-tuning a pretrained
            model. Try 5e-4 to train from scratch.
        weight_decay: The weight decay of AdamW, often between 0.01 and 0.2. It is not applied to norms, biases and
            ``logit_scale``.
        warmup_steps: The number of optimizer steps in which the learning rate rises. After them a cosine takes it to zero. Use
            about 5 to 10 % of the run. A run that is shorter gets a warning.
        chunk_size: The largest number of images, or texts, that are encoded at once, such as 64. Set it when a batch does not
            fit into memory: the gradient is still that of the whole batch, and a step takes about a third longer, because each
            chunk is encoded again in the backward pass. BatchNorm in training mode normalises each chunk by itself and counts
            it twice in its running statistics, so a fit warns of it. Default: the whole batch at once.

    Raises:
        ValueError: if a number is negative, or if ``chunk_size`` is not a positive integer.
        TypeError: if the loss is not a ``torch.nn.Module``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_itm import DualEncoder
        >>> class Linear(DualEncoder):
        ...     def __init__(self, **kwargs):
        ...         super().__init__(**kwargs)
        ...         self.image_encoder, self.text_encoder = nn.Linear(8, 4), nn.Linear(6, 4)
        ...     def encode_image(self, image): return self.image_encoder(image)
        ...     def encode_text(self, text): return self.text_encoder(text)
        >>> ids = torch.arange(3)
        >>> batch = {"image": torch.ones(3, 8), "text": torch.ones(3, 6), "image_id": ids, "text_id": ids}
        >>> Linear().training_step(batch, 0)  # three equal pairs, so that each text has one chance in three: ln 3
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
        self.save_settings({**settings, "chunk_size": chunk_size})  # modules among a subclass's arguments stay out
        self.learning_rate, self.weight_decay, self.warmup_steps = learning_rate, weight_decay, warmup_steps
        self.chunk_size = chunk_size
        self.set_loss(loss)
        self._retrieval = RetrievalMetrics()

    def encode_image(self, image: Any) -> Tensor:
        """Encode images. Override this. Return one vector per image, `(pairs, dim)`. It is normalised for you."""
        raise NotImplementedError(f"Override `encode_image` in {type(self).__name__}: one vector each, (pairs, dim).")

    def encode_text(self, text: Any) -> Tensor:
        """Encode texts. Override this. Return one vector per text, `(pairs, dim)`. It is normalised for you."""
        raise NotImplementedError(f"Override `encode_text` in {type(self).__name__}: one vector each, (pairs, dim).")

    def towers(self) -> dict[str, nn.Module]:
        """Return the parts that the gradient monitor watches separately. Override it if they have other names.

        By default these are ``image_encoder`` and ``text_encoder``, or the whole model if one of them is missing.
        """
        found = {name: getattr(self, f"{name}_encoder", None) for name in ("image", "text")}
        modules = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
        return modules if len(modules) == 2 else {"model": self}

    def embed(self, batch: Any) -> EmbeddingPairs:
        """Encode a batch into embeddings of norm 1, in float32 whatever the autocast dtype.

        Raises:
            TypeError: if the batch is not a dict.
            ValueError: if a key is missing, or if the two encoders return vectors of different widths.
        """
        check_batch(batch)
        image, text = self._unit_vectors("image", batch["image"]), self._unit_vectors("text", batch["text"])
        return EmbeddingPairs(image, text, batch["image_id"], batch["text_id"], batch.get("caption_id"))

    def embed_hard_negatives(self, hard: Mapping[str, Any]) -> HardNegatives:
        """Encode the mined negatives of a batch, with gradient.

        Args:
            hard: What :class:`~lightning_itm.HardNegativeDataset` puts into ``batch["hard"]``: images and texts before the
                encoders, one row for each pair of the batch.
        """
        return HardNegatives(
            text_embeddings=self._unit_vectors("text", hard["text"]),
            image_of_text_embeddings=self._unit_vectors("image", hard["image_of_text"]),
            image_id_of_text=hard["image_id_of_text"],
            image_embeddings=self._unit_vectors("image", hard["image"]),
            text_of_image_embeddings=self._unit_vectors("text", hard["text_of_image"]),
            image_id=hard["image_id"],
            caption_id=hard.get("caption_id"),
            caption_id_of_image=hard.get("caption_id_of_image"),
        )

    def forward(self, batch: Any) -> EmbeddingPairs:
        """Encode a batch."""
        return self.embed(batch)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> EmbeddingPairs | dict[str, Tensor]:
        """Encode a batch of pairs, or a batch of images or of texts alone, which becomes a dict of unit vectors and ids."""
        alone = [kind for kind in ("image", "text") if kind in batch and f"{kind}_id" in batch]
        if len(alone) != 1:
            return self.embed(batch)
        (kind,) = alone
        return {**batch, kind: self._unit_vectors(kind, batch[kind])}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | dict[str, Any]:
        """Compute the loss of a batch, against the candidates of all ranks.

        Returns:
            The loss. Where a callback asks for the embeddings, a dict of the loss and those of all ranks, without gradient.
        """
        pairs = self.embed(batch)
        candidates = pairs.gather()
        # Callbacks and the loss share nothing but these entries, so that the step needs no Trainer.
        inputs = {name: batch[name] for name in LOSS_INPUTS if name in batch}
        for name, embed in (("hard", self.embed_hard_negatives), ("hard_captions", self.embed_hard_captions)):
            if isinstance(inputs.get(name), Mapping):  # samples; embeddings need no further forward pass
                inputs[name] = embed(inputs[name])
        outputs: dict[str, Tensor] = self.loss(pairs, candidates, **inputs)
        if not isinstance(outputs, dict) or "loss" not in outputs:
            raise TypeError(f"Expected the loss to return a dict with 'loss', got {type(outputs).__name__}.")
        if self._trainer is not None:  # a test may hand in a batch without a Trainer
            # Nothing on the progress bar: it would wait for the device at every step.
            self.log_dict({f"train/{name}": value.detach() for name, value in outputs.items()}, batch_size=len(pairs))
        if batch.get(RETURN_EMBEDDINGS):
            embeddings = candidates.image_embeddings.detach(), candidates.text_embeddings.detach(), candidates.text_id
            return {"loss": outputs["loss"], RETURN_EMBEDDINGS: embeddings}
        return outputs["loss"]

    def configure_retrieval(self, stage: str) -> ImageTextRetrieval:
        """Return a new metric for ``stage`` (``"val"`` or ``"test"``). Override it for another K, or for folds."""
        return ImageTextRetrieval()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take a batch into the metric of its loader."""
        self._retrieval.take("val", dataloader_idx, batch, self)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take a batch into the metric of its loader."""
        self._retrieval.take("test", dataloader_idx, batch, self)

    # The metrics are emptied at the start of an epoch, not only at its end: an interrupted validation has no end.
    def on_validation_epoch_start(self) -> None:
        """Empty the metrics of the validation sets."""
        self._retrieval.reset("val")

    def on_test_epoch_start(self) -> None:
        """Empty the metrics of the test sets."""
        self._retrieval.reset("test")

    # The whole set is needed at once for recall, so the end of the epoch is the first moment that can log it.
    def on_validation_epoch_end(self) -> None:
        """Log retrieval over the whole validation set."""
        self._log_retrieval("val")

    def on_test_epoch_end(self) -> None:
        """Log retrieval over the whole test set."""
        self._log_retrieval("test")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the groups of AdamW: no decay on norms, biases and ``logit_scale``. Override it for other groups or rates.

        Raises:
            ValueError: if all parameters are frozen.
        """
        return decay_groups(self)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW over :meth:`parameter_groups`, with a warm-up and a cosine per optimizer step."""
        optimizer = torch.optim.AdamW(self.parameter_groups(), lr=self.learning_rate, weight_decay=self.weight_decay)
        total, warmup = self.trainer.estimated_stepping_batches, self.warmup_steps
        if 0 < total <= warmup:
            rank_zero_warn(
                f"The run has {total} optimizer steps and `warmup_steps={warmup}`: the learning rate never reaches "
                f"{self.learning_rate}. Lower `warmup_steps`."
            )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(warmup, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Continue with the random streams of a checkpoint, and warn where chunks change the result."""
        super().on_train_start()
        warn_of_batch_norm(self, self.chunk_size)  # here, because a user may freeze norms until training starts

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights, and explain the error if they were trained with another loss."""
        theirs = {name for name in state_dict if name.startswith("loss.")}
        ours = {f"loss.{name}" for name in self.loss.state_dict()}
        if strict and theirs != ours:
            raise RuntimeError(
                f"Expected the weights of {type(self.loss).__name__}, {sorted(ours)}, got {sorted(theirs)}: another loss was "
                "trained. Pass it, as in `load_from_checkpoint(path, loss=...)`, or `strict=False` to go on with this one."
            )
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _unit_vectors(self, kind: Any, inputs: Any) -> Tensor:
        encode = returning_vectors(getattr(self, f"encode_{kind}"), kind)
        return unit_norm(encode_in_chunks(encode, inputs, self.chunk_size))

    def _log_retrieval(self, stage: str) -> None:
        for values in self._retrieval.compute(stage):
            self.log_dict(values, sync_dist=True)  # equal on all ranks already, but Lightning warns without
