"""The embeddings that the training steps compute anyway, kept to be mined."""

from typing import Any

import torch
from torch import Tensor

from lightning_itm.embeddings import RETURN_EMBEDDINGS
from lightning_itm.functional.similarity import unit_norm
from lightning_itm.mining.encoded import EncodedPairs


class TrainingEmbeddings:
    """Keep the newest training embedding of each pair of a set, in half precision, so that mining needs no pass of its own.

    They are of the augmented image and of the weights at the step in which the pair was seen. A pair that an epoch leaves out
    keeps its older row.

    Args:
        text_image_id: The image that each text belongs to, int64 `(pairs,)`. The number of a pair is that of its text.
        num_images: Number of images of the set.
        caption_id: The number of the caption of each text, int64 `(pairs,)`. Default: captions are not compared.

    Attributes:
        rows: float16 `(2, pairs, dim)`, image and text of each pair, zeros where there is none. None before the first batch.
        is_known: bool `(pairs,)`, whether a pair was seen.
    """

    def __init__(self, text_image_id: Tensor, num_images: int, caption_id: Tensor | None = None) -> None:
        self.text_image_id, self.num_images, self.caption_id = text_image_id, num_images, caption_id
        self.rows: Tensor | None = None
        self.is_known = torch.zeros(len(text_image_id), dtype=torch.bool)

    def update(self, image_embeddings: Tensor, text_embeddings: Tensor, text_id: Tensor) -> None:
        """Keep the embeddings of a batch, without a wait of the host.

        Args:
            image_embeddings: `(pairs, dim)`, unit-norm, of all ranks, so that each rank keeps the same.
            text_embeddings: `(pairs, dim)`, unit-norm, likewise.
            text_id: int64 `(pairs,)`, the numbers of the pairs.
        """
        rows = torch.stack([image_embeddings, text_embeddings]).detach().half()  # (2, batch, dim)
        if self.rows is None:  # only now the width is known
            self.rows = rows.new_zeros(2, len(self.is_known), rows.shape[2])
        if self.rows.device != rows.device:  # after a resume
            self.rows = self.rows.to(rows.device)
        self.is_known = self.is_known.to(rows.device).index_fill_(0, text_id, True)
        self.rows.index_copy_(1, text_id, rows)

    def to(self, device: torch.device) -> None:
        """Move what there is to a device, where it is mined."""
        self.is_known = self.is_known.to(device)
        self.rows = None if self.rows is None else self.rows.to(device)

    def encoded(self) -> EncodedPairs:
        """Return what :func:`~lightning_itm.mining.find_negatives` searches.

        The embedding of an image is the mean over its pairs, which came with other augmentations.

        Raises:
            RuntimeError: if there was no batch so far.
            ValueError: if an embedding is not finite.
        """
        if self.rows is None:
            raise RuntimeError("Expected the embeddings of at least one training step, got none.")
        image_rows, texts = self.rows.float()  # (pairs, dim) each
        owner = self.text_image_id.to(texts.device)
        for kind, values in (("image", image_rows), ("text", texts)):
            if not bool(values.isfinite().all()):
                raise ValueError(
                    f"Expected finite {kind} embeddings in training, got NaN or infinity. The earlier table is kept. "
                    "Lower the learning rate, or clip gradients."
                )
        # Rows of pairs that were never seen are zero, and count for nothing in the sum.
        images = unit_norm(image_rows.new_zeros(self.num_images, texts.shape[1]).index_add_(0, owner, image_rows))
        all_images = torch.ones(self.num_images, dtype=torch.bool, device=texts.device)
        caption_id = None if self.caption_id is None else self.caption_id.to(texts.device)
        return EncodedPairs(images, unit_norm(texts), owner, all_images, self.is_known, caption_id)

    def state_dict(self) -> dict[str, Any]:
        """Return the rows. They are the same on every rank, so that the checkpoint of rank 0 has them all."""
        rows = None if self.rows is None else self.rows.to("cpu", copy=True)
        return {"rows": rows, "is_known": self.is_known.to("cpu", copy=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the rows of a checkpoint. The next batch, or mining, takes them to its device."""
        self.rows, self.is_known = state["rows"], state["is_known"]


def step_embeddings(outputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the embeddings of both sides and the numbers of the pairs from what ``training_step`` returned.

    Raises:
        RuntimeError: if it returned none, as one that a user overrides.
    """
    if not isinstance(outputs, dict) or RETURN_EMBEDDINGS not in outputs:
        got = list(outputs) if isinstance(outputs, dict) else type(outputs).__name__
        raise RuntimeError(
            f"Expected `training_step` to return its embeddings where the batch asks for them, got {got}. Return {{'loss': "
            f"loss, {RETURN_EMBEDDINGS!r}: (image_embeddings, text_embeddings, text_id)}} of all ranks from your own "
            "`training_step`, or use `encode='pass'`."
        )
    image_embeddings, text_embeddings, text_id = outputs[RETURN_EMBEDDINGS]
    return image_embeddings, text_embeddings, text_id
