"""A LightningModule that checks the negatives of its batches: that there are some, and that the loss takes hard captions."""

import inspect
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_itm.embeddings import HardCaptions


class ChecksNegatives(L.LightningModule):
    """Warn once if all pairs of an epoch's first batch are of one image, and nothing else brings negatives."""

    _has_looked = False
    _has_warned = False

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Warn if the first batch of an epoch has no negatives. Callbacks, which may bring some, run before this hook."""
        if batch_idx > 0:
            return  # a last batch that is not full may have one image by chance
        image_id = batch.get("image_id") if isinstance(batch, Mapping) else None
        # The pairs of other ranks are negatives, too.
        if self._has_warned or not isinstance(image_id, Tensor) or self.trainer.world_size > 1:
            return
        if {"memory", "hard", "hard_captions"} & set(batch) or not self._is_one_image(image_id):
            return
        self._has_warned = True
        rank_zero_warn(
            f"The first batch has {len(image_id)} pairs, all of one image, so that there are no negatives and nothing to "
            "tell apart. Raise `batch_size`. `accumulate_grad_batches` does not help, since it adds gradients and no "
            "negatives. If memory is short, `DualEncoder(chunk_size=...)` makes large batches fit."
        )

    def _is_one_image(self, image_id: Tensor) -> bool:
        if len(image_id) < 2:
            return len(image_id) == 1
        if image_id.device.type != "cpu":
            if self._has_looked:  # the host waits for the device before the first step, and never between two
                return False
            self._has_looked = True
        ids = image_id.cpu().numpy()  # (pairs,), on a CPU the same memory
        return bool((ids == ids[0]).all())

    def embed_hard_captions(self, captions: Mapping[str, Any]) -> HardCaptions:
        """Encode the hard captions of a batch, with gradient.

        Args:
            captions: ``text``, token ids `(pairs, captions, ...)` or a list of lists of strings `(captions, pairs)`, and
                ``mask``, bool `(pairs, captions)`, as :class:`~lightning_itm.ImageTextDataset` gives them.

        Raises:
            TypeError: if the loss does not take them.
        """
        loss: Any = self.loss
        parameters = inspect.signature(loss.forward).parameters
        if "hard_captions" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            raise TypeError(
                f"Expected a loss that takes `hard_captions`, which the batch has, got {type(loss).__name__}. Use "
                "InfoNCELoss, SigmoidLoss or TripletLoss, or make the dataset without `hard_captions`."
            )
        text, mask = captions["text"], captions["mask"]
        num_pairs, num_captions = mask.shape
        encode: Any = self._unit_vectors
        if isinstance(text, Tensor):
            vectors = encode("text", text.flatten(0, 1)).unflatten(0, (num_pairs, num_captions))
        else:  # strings: collating puts the first of each pair together, then the second
            vectors = encode("text", [one for some in text for one in some]).unflatten(0, (num_captions, num_pairs))
            vectors = vectors.transpose(0, 1)
        return HardCaptions(vectors, mask)  # (pairs, captions, dim)
