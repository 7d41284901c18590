"""A queue of embeddings of earlier batches."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_itm.embeddings import EmbeddingPairs


class MemoryBank(nn.Module):
    """Keep the embeddings of the last pairs, the oldest overwritten first. Batches may be of any size up to the queue's.

    Args:
        size: How many pairs it holds.
        dim: The width of the embeddings.

    Raises:
        ValueError: A count that is not positive.

    Example:
        >>> bank, ids = MemoryBank(size=4, dim=2), torch.arange(3)
        >>> bank.enqueue(EmbeddingPairs(torch.ones(3, 2), torch.ones(3, 2), ids, ids))
        >>> bank.image_id
        tensor([ 0,  1,  2, -1])
    """

    image: Tensor
    text: Tensor
    image_id: Tensor
    valid: Tensor
    num_refused: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if value < 1:
                raise ValueError(f"Expected `{name}` to be positive, got {value}.")
        self.position = 0  # on the host, which would have to ask the device otherwise
        for name in ("image", "text"):
            self.register_buffer(name, torch.zeros(size, dim))
        self.register_buffer("image_id", torch.full((size,), -1))
        self.register_buffer("valid", torch.zeros(size, dtype=torch.bool))
        self.register_buffer("num_refused", torch.zeros((), dtype=torch.long), persistent=False)

    def __len__(self) -> int:
        return len(self.image)

    def check(self, pairs: EmbeddingPairs) -> None:
        """Say so if a batch does not fit.

        Raises:
            ValueError: It is larger than the queue, or of another width.
        """
        if len(pairs) > len(self):
            raise ValueError(
                f"Expected a queue of at least one batch of all processes, {len(pairs)} pairs, got a size of {len(self)}. "
                "Raise `queue_size`, or lower the batch size."
            )
        if pairs.image_embeddings.shape[1] != self.image.shape[1]:
            raise ValueError(
                f"Expected embeddings as wide as the queue's, {self.image.shape[1]}, got {pairs.image_embeddings.shape[1]}. "
                "A queue serves one model: start it anew."
            )

    def with_batch(self, pairs: EmbeddingPairs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return image and text embeddings, image ids and validity, of the pairs first and then of the whole queue."""
        pairs, valid = _finite(pairs)
        return (
            torch.cat([pairs.image_embeddings, self.image]),
            torch.cat([pairs.text_embeddings, self.text]),
            torch.cat([pairs.image_id, self.image_id]),
            torch.cat([valid, self.valid]),
        )

    @torch.no_grad()
    def enqueue(self, pairs: EmbeddingPairs) -> None:
        """Put pairs in the place of the oldest.

        Those with an embedding that is not finite take their places as invalid, and are counted in ``num_refused``.

        Args:
            pairs: The pairs of all ranks, in the same order on each.

        Raises:
            ValueError: More pairs than the queue has places, or embeddings of another width.
        """
        self.check(pairs)
        pairs, valid = _finite(pairs)
        places = (torch.arange(len(pairs), device=valid.device) + self.position) % len(self)
        self.image[places] = pairs.image_embeddings.to(self.image.dtype)
        self.text[places] = pairs.text_embeddings.to(self.text.dtype)
        self.image_id[places] = pairs.image_id
        self.valid[places] = valid
        self.num_refused += (~valid).sum()
        self.position = (self.position + len(pairs)) % len(self)

    def fill(self) -> Tensor:
        """Return the share of places that hold a pair."""
        return self.valid.float().mean()

    def get_extra_state(self) -> dict[str, Any]:
        """Return where the next pair goes."""
        return {"position": self.position}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on there."""
        self.position = state["position"]


def _finite(pairs: EmbeddingPairs) -> tuple[EmbeddingPairs, Tensor]:
    """Put zeros where an embedding is not finite, and say where that is not so."""
    valid = pairs.image_embeddings.isfinite().all(dim=1) & pairs.text_embeddings.isfinite().all(dim=1)
    image, text = (
        torch.where(valid[:, None], part.detach(), 0) for part in (pairs.image_embeddings, pairs.text_embeddings)
    )
    return EmbeddingPairs(image, text, pairs.image_id, pairs.text_id), valid


def in_order_of_one_process(pairs: EmbeddingPairs, world_size: int) -> EmbeddingPairs:
    """Undo the split of a ``DistributedSampler``, which deals pairs out in turn, so that the queue is that of one process.

    Args:
        pairs: The pairs of all ranks, rank by rank.
        world_size: The number of ranks.
    """
    return EmbeddingPairs(
        *(
            part.unflatten(0, (world_size, -1)).transpose(0, 1).flatten(0, 1)
            for part in (pairs.image_embeddings, pairs.text_embeddings, pairs.image_id, pairs.text_id)
        )
    )
