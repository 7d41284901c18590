"""A batch after the encoders: pairs of embeddings, and negatives mined for them."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_itm.distributed import gather, gather_with_gradient


@dataclass  # not frozen: Lightning moves what it holds to other devices
class EmbeddingPairs:
    """The embeddings of a batch, row by row a matching pair.

    Args:
        image: `(pairs, dim)`, unit-norm, float32 (or float64).
        text: `(pairs, dim)`, unit-norm, float32 (or float64).
        image_id: int64 `(pairs,)`; the image each row belongs to.
        text_id: int64 `(pairs,)`.

    Raises:
        ValueError: The four do not have the same number of rows, or the embeddings not the same width.
        TypeError: The ids are no integers.

    Example:
        >>> import torch
        >>> ids = torch.arange(2)
        >>> len(EmbeddingPairs(torch.eye(2), torch.eye(2), ids, ids))
        2
    """

    image: Tensor
    text: Tensor
    image_id: Tensor
    text_id: Tensor

    def __post_init__(self) -> None:
        for name in ("image", "text"):
            if getattr(self, name).ndim != 2:
                raise ValueError(
                    f"Expected the {name} embeddings to have the shape (pairs, dim), got {tuple(getattr(self, name).shape)}. "
                    f"Return one vector a pair from `encode_{name}`."
                )
        for name in ("image_id", "text_id"):
            ids = getattr(self, name)
            if not isinstance(ids, Tensor) or ids.ndim != 1 or ids.is_floating_point():
                got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
                raise TypeError(
                    f"Expected `{name}` to be an int64 tensor of shape (pairs,), got {got}. Number them from 0."
                )
        rows = {field.name: getattr(self, field.name).shape[0] for field in fields(self)}
        if len(set(rows.values())) > 1:
            raise ValueError(f"Expected one row a pair in all of {list(rows)}, got {rows} rows.")
        if self.image.shape[1] != self.text.shape[1]:
            raise ValueError(
                "Expected image and text embeddings of one width, got "
                f"{self.image.shape[1]} (image) and {self.text.shape[1]} (text). Project both towers to the same width."
            )

    def __len__(self) -> int:
        return len(self.image)

    def __add__(self, other: "EmbeddingPairs") -> "EmbeddingPairs":
        """Concatenate two sets of pairs."""
        return EmbeddingPairs(*(torch.cat([getattr(self, name), getattr(other, name)]) for name in _FIELDS))

    def gather(self) -> "EmbeddingPairs":
        """Concatenate the pairs of all ranks, embeddings with gradient. Every rank must hold as many pairs."""
        return EmbeddingPairs(
            gather_with_gradient(self.image),
            gather_with_gradient(self.text),
            gather(self.image_id),
            gather(self.text_id),
        )


_FIELDS = tuple(field.name for field in fields(EmbeddingPairs))


@dataclass
class HardNegatives:
    """Negatives mined over the whole training set, row by row for the pairs of a batch.

    For a pair (I1, T1): T3, a hard text of I1, with the image I4 it belongs to; and I3, a hard image of T1, with a text T4 of
    it. (I4, T3) and (I3, T4) match.

    Args:
        text: T3, `(pairs, dim)`, unit-norm.
        text_image: I4, `(pairs, dim)`, unit-norm.
        text_image_id: The id of I4, int64 `(pairs,)`; −1 where no text was mined.
        image: I3, `(pairs, dim)`, unit-norm.
        image_text: T4, `(pairs, dim)`, unit-norm.
        image_id: The id of I3, int64 `(pairs,)`; −1 where no image was mined.
    """

    text: Tensor
    text_image: Tensor
    text_image_id: Tensor
    image: Tensor
    image_text: Tensor
    image_id: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        """Hold nothing that Lightning could take for the size of a batch."""
        return iter(())

    def as_pairs(self) -> EmbeddingPairs:
        """Return the mined pairs (I4, T3) and (I3, T4), which are candidates like any other. Their text ids are −1."""
        image_id = torch.cat([self.text_image_id, self.image_id])
        return EmbeddingPairs(
            torch.cat([self.text_image, self.image]),
            torch.cat([self.text, self.image_text]),
            image_id,
            torch.full_like(image_id, -1),
        )
