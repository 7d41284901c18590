"""A queue of the embeddings of earlier batches."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_itm.embeddings import EmbeddingPairs


class MemoryBank(nn.Module):
    """Keep the embeddings of the last pairs in a queue. The oldest are overwritten first.

    Batches may be of any size up to that of the queue.

    Args:
        size: The number of pairs to hold. Usual: 1,024 to 65,536.
        dim: The width of the embeddings, such as 512.

    Raises:
        ValueError: if ``size`` or ``dim`` is not positive.

    Attributes:
        image: `(size, dim)`, the image embeddings, zeros in empty places.
        text: `(size, dim)`, row by row the matching text embeddings.
        image_id: int64 `(size,)`, the image that each row belongs to, −1 in empty places.
        caption_id: int64 `(size,)`, the number of the caption of each row, −1 in empty places and where it is not known.
        valid: bool `(size,)`, False in empty places and where an embedding was not finite.
        num_refused: int64 `()`, the pairs that came with an embedding that is not finite.

    Example:
        >>> import torch
        >>> from lightning_itm.embeddings import EmbeddingPairs
        >>> from lightning_itm.memory_bank import MemoryBank
        >>> bank, ids = MemoryBank(size=4, dim=2), torch.arange(3)
        >>> bank.enqueue(EmbeddingPairs(torch.ones(3, 2), torch.ones(3, 2), ids, ids))
        >>> bank.image_id
        tensor([ 0,  1,  2, -1])
    """

    image: Tensor
    text: Tensor
    image_id: Tensor
    caption_id: Tensor
    valid: Tensor
    num_refused: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if value < 1:
                raise ValueError(f"Expected `{name}` to be positive, got {value}.")
        self.position = 0  # on the host: as a tensor, each step would wait for the device to read it
        for name in ("image", "text"):
            self.register_buffer(name, torch.zeros(size, dim))
        for name in ("image_id", "caption_id"):
            self.register_buffer(name, torch.full((size,), -1))
        self.register_buffer("valid", torch.zeros(size, dtype=torch.bool))
        # Not in the checkpoint: a resumed run must not fail for what happened before.
        self.register_buffer("num_refused", torch.zeros((), dtype=torch.long), persistent=False)

    def __len__(self) -> int:
        return len(self.image)

    def check(self, pairs: EmbeddingPairs) -> None:
        """Raise if a batch does not fit the queue.

        Args:
            pairs: The pairs of all ranks that would be put into it.

        Raises:
            ValueError: if there are more pairs than places, or the embeddings have another width than those in the queue.
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
        """Return the candidates of a step: its own pairs first, and then the whole queue.

        Args:
            pairs: The pairs of all ranks, `(pairs, dim)` twice, as the slow copy embeds them.

        Returns:
            Image embeddings and text embeddings `(pairs + size, dim)`, their image ids `(pairs + size,)`, and a bool mask of
            the same shape that is False for empty places and for embeddings that are not finite.
        """
        pairs, valid = _finite(pairs)
        return (
            torch.cat([pairs.image_embeddings, self.image]),
            torch.cat([pairs.text_embeddings, self.text]),
            torch.cat([pairs.image_id, self.image_id]),
            torch.cat([valid, self.valid]),
        )

    def captions_with_batch(self, pairs: EmbeddingPairs) -> Tensor | None:
        """Return the captions of the candidates of :meth:`with_batch`, int64 `(pairs + size,)`, −1 where not known.

        It is None if the pairs have none: there is nothing to compare them with.
        """
        return None if pairs.caption_id is None else torch.cat([pairs.caption_id, self.caption_id])

    @torch.no_grad()
    def enqueue(self, pairs: EmbeddingPairs) -> None:
        """Put pairs into the queue, in the places of the oldest.

        A pair with an embedding that is not finite takes its place as invalid, and is counted in ``num_refused``.

        Args:
            pairs: The pairs of all ranks, `(pairs, dim)` twice, in the same order on each rank.

        Raises:
            ValueError: if there are more pairs than places, or the embeddings have another width than those in the queue.
        """
        self.check(pairs)
        pairs, valid = _finite(pairs)
        # (pairs,), from the oldest on and round the end. No index comes twice, so that the order of writing is no matter.
        places = (torch.arange(len(pairs), device=valid.device) + self.position) % len(self)
        self.image[places] = pairs.image_embeddings.to(self.image.dtype)
        self.text[places] = pairs.text_embeddings.to(self.text.dtype)
        self.image_id[places], self.caption_id[places] = pairs.image_id, pairs.known_captions()
        self.valid[places] = valid
        self.num_refused += (~valid).sum()
        self.position = (self.position + len(pairs)) % len(self)

    def fill(self) -> Tensor:
        """Return the fraction of places that hold a pair, `()`."""
        return self.valid.float().mean()

    def get_extra_state(self) -> dict[str, Any]:
        """Return where the next pair goes, for the checkpoint: it is no tensor."""
        return {"position": self.position}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Let the next pair go where the checkpoint says."""
        self.position = state["position"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(f"{prefix}caption_id", torch.full_like(self.caption_id, -1))  # of an older version
        super()._load_from_state_dict(state_dict, prefix, *args)


def _finite(pairs: EmbeddingPairs) -> tuple[EmbeddingPairs, Tensor]:
    """Put zeros where an embedding is not finite. Return the pairs, and which of them are finite, bool `(pairs,)`."""
    valid = pairs.image_embeddings.isfinite().all(dim=1) & pairs.text_embeddings.isfinite().all(dim=1)
    image, text = (
        torch.where(valid[:, None], part.detach(), 0) for part in (pairs.image_embeddings, pairs.text_embeddings)
    )
    return replace(pairs, image_embeddings=image, text_embeddings=text), valid


def in_order_of_one_process(pairs: EmbeddingPairs, world_size: int) -> EmbeddingPairs:
    """Order gathered pairs as one process would have them, so that the queue does not depend on the number of ranks.

    A ``DistributedSampler`` deals pairs out in turn: of two ranks, the first has pairs 0, 2, 4, … and the second 1, 3, 5, …

    Args:
        pairs: The pairs of all ranks, rank by rank, equally many from each.
        world_size: The number of ranks. With 1, the order stays as it is.
    """
    # (ranks, rows, ...) -> (rows, ranks, ...) -> (rows * ranks, ...)
    return pairs.map(lambda part: part.unflatten(0, (world_size, -1)).transpose(0, 1).flatten(0, 1))
