"""What a batch is after the encoders: pairs of embeddings, and the negatives that were mined for them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_itm.distributed import gather, gather_with_gradient

RETURN_EMBEDDINGS = "return_embeddings"
"""The key by which a batch asks ``training_step`` for its embeddings, and under which they come back."""


@dataclass  # not frozen: Lightning moves what it holds to other devices
class EmbeddingPairs:
    """Hold the embeddings of a batch. Row by row they are matching pairs.

    Args:
        image_embeddings: `(pairs, dim)`, unit-norm, float32 (or float64).
        text_embeddings: `(pairs, dim)`, unit-norm, float32 (or float64).
        image_id: Integers `(pairs,)`, the image that each row belongs to. Rows of one image are never each other's
            negatives. They are kept as int64.
        text_id: Integers `(pairs,)`, the number of the text of each row. They are kept as int64.
        caption_id: Integers `(pairs,)`, the number of the caption of each row. Rows of one caption are never each other's
            negatives. −1 stands for a caption that is not known. Default: captions are not compared.

    Raises:
        ValueError: if they do not have the same number of rows, or the embeddings differ in width.
        TypeError: if the ids are no integer tensors.

    Example:
        >>> import torch
        >>> from lightning_itm.embeddings import EmbeddingPairs
        >>> ids = torch.arange(2)
        >>> len(EmbeddingPairs(torch.eye(2), torch.eye(2), ids, ids))
        2
    """

    image_embeddings: Tensor
    text_embeddings: Tensor
    image_id: Tensor
    text_id: Tensor
    caption_id: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("image", "text"):
            shape = tuple(getattr(self, f"{name}_embeddings").shape)
            if len(shape) != 2:
                raise ValueError(
                    f"Expected `{name}_embeddings` to have the shape (pairs, dim), got {shape}. "
                    f"Return one vector per pair from `encode_{name}`."
                )
        for name in ("image_id", "text_id", *(("caption_id",) if self.caption_id is not None else ())):
            ids = getattr(self, name)
            if not isinstance(ids, Tensor) or ids.ndim != 1 or ids.is_floating_point():
                got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
                raise TypeError(
                    f"Expected `{name}` to be an int64 tensor of shape (pairs,), got {got}. Number them from 0."
                )
            setattr(self, name, ids.long())  # −1 and indices of rows come beside them, which need the same type
        rows = {name: part.shape[0] for name, part in vars(self).items() if part is not None}
        if len(set(rows.values())) > 1:
            raise ValueError(f"Expected one row per pair in all of {list(rows)}, got {rows} rows.")
        image_dim, text_dim = self.image_embeddings.shape[1], self.text_embeddings.shape[1]
        if image_dim != text_dim:
            raise ValueError(
                f"Expected image and text embeddings of one width, got {image_dim} (image) and {text_dim} (text). Project "
                "both towers to the same width."
            )

    def __len__(self) -> int:
        return len(self.image_embeddings)

    def __add__(self, other: "EmbeddingPairs") -> "EmbeddingPairs":
        """Concatenate two sets of pairs. Where one of them has no captions, they are not known, −1."""
        joined = [torch.cat([getattr(self, name), getattr(other, name)]) for name in _REQUIRED]
        if self.caption_id is not None or other.caption_id is not None:
            joined.append(torch.cat([self.known_captions(), other.known_captions()]))
        return EmbeddingPairs(*joined)

    def known_captions(self) -> Tensor:
        """Return the number of the caption of each row, int64 `(pairs,)`, −1 where it is not known."""
        return torch.full_like(self.text_id, -1) if self.caption_id is None else self.caption_id

    def map(self, function: Callable[[Tensor], Tensor]) -> "EmbeddingPairs":
        """Return pairs whose tensors are what ``function`` makes of each tensor, such as some of the rows."""
        parts = [getattr(self, name) for name in _REQUIRED] + ([] if self.caption_id is None else [self.caption_id])
        return EmbeddingPairs(*(function(part) for part in parts))

    def gather(self) -> "EmbeddingPairs":
        """Concatenate the pairs of all ranks. Every rank must hold the same number of pairs.

        Each rank gets back the gradients that all ranks have for its embeddings. Ids have none.
        """
        return self.map(lambda part: gather_with_gradient(part) if part.is_floating_point() else gather(part))


_REQUIRED = ("image_embeddings", "text_embeddings", "image_id", "text_id")


@dataclass  # not frozen, as above
class HardNegatives:
    """Hold negatives that were mined over the whole training set. Row by row they are those of the pairs of a batch.

    For a pair (I1, T1) they are two pairs. (I4, T3): a text T3 that is hard for I1, with the image I4 that it belongs to.
    (I3, T4): an image I3 that is hard for T1, with a text T4 of it.

    Args:
        text_embeddings: T3, `(pairs, dim)`, unit-norm, without gradient in embedding mode.
        image_of_text_embeddings: I4, `(pairs, dim)`, unit-norm.
        image_id_of_text: The id of I4, int64 `(pairs,)`. It is −1 where no text was mined. Such a row must be skipped.
        image_embeddings: I3, `(pairs, dim)`, unit-norm.
        text_of_image_embeddings: T4, `(pairs, dim)`, unit-norm.
        image_id: The id of I3, int64 `(pairs,)`. It is −1 where no image was mined. Such a row must be skipped.
        positive: Where the negatives are stored embeddings of the mining pass: the pairs of the batch as that pass embedded
            them. Stored negatives are compared with stored positives only. ``None``: encoded in this step.
        caption_id: The number of the caption T3, int64 `(pairs,)`, −1 where no text was mined. Default: captions are not
            compared.
        caption_id_of_image: The number of the caption T4, likewise. Both, or neither.
    """

    text_embeddings: Tensor
    image_of_text_embeddings: Tensor
    image_id_of_text: Tensor
    image_embeddings: Tensor
    text_of_image_embeddings: Tensor
    image_id: Tensor
    positive: EmbeddingPairs | None = None
    caption_id: Tensor | None = None
    caption_id_of_image: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        """Yield nothing."""
        # Lightning iterates over what a batch holds to infer the batch size, and warns where it finds several sizes.
        return iter(())

    def as_pairs(self) -> EmbeddingPairs:
        """Return the mined pairs as candidates like any other, first all (I4, T3), then all (I3, T4). Text ids are −1."""
        image_id = torch.cat([self.image_id_of_text, self.image_id])  # (2 * pairs,)
        captions = None
        if self.caption_id is not None and self.caption_id_of_image is not None:
            captions = torch.cat([self.caption_id, self.caption_id_of_image])
        return EmbeddingPairs(
            torch.cat([self.image_of_text_embeddings, self.image_embeddings]),
            torch.cat([self.text_embeddings, self.text_of_image_embeddings]),
            image_id,
            torch.full_like(image_id, -1),
            captions,
        )


@dataclass  # not frozen, as above
class HardCaptions:
    """Hold captions without an image that are wrong for the images of a batch, such as rewritten ones.

    They are negatives of their own image only. Whether a rewritten caption fits another image, nobody has checked.

    Args:
        text_embeddings: Some captions per pair, `(pairs, captions, dim)`, unit-norm.
        mask: bool `(pairs, captions)`, False where there is none. Such an entry must be skipped, whatever its embedding is.

    Raises:
        ValueError: if the shapes do not fit, or if the mask is not bool.

    Example:
        >>> import torch
        >>> from lightning_itm.embeddings import HardCaptions
        >>> HardCaptions(torch.ones(2, 1, 4), torch.tensor([[True], [False]])).mask.sum()  # none for the second pair
        tensor(1)

    References:
        Yuksekgonul et al., *When and why vision-language models behave like bags-of-words, and what to do about it*, ICLR 2023
        (NegCLIP). There they are negatives of all images of the batch.
    """

    text_embeddings: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        shape, of_mask = tuple(self.text_embeddings.shape), tuple(self.mask.shape)
        if len(shape) != 3 or of_mask != shape[:2] or self.mask.dtype != torch.bool:
            raise ValueError(
                "Expected `text_embeddings` (pairs, captions, dim) and a bool `mask` (pairs, captions), got "
                f"{shape} and {self.mask.dtype} {of_mask}. The mask says where there is no caption."
            )

    def __iter__(self) -> Iterator[Tensor]:
        """Yield nothing."""
        return iter(())  # for Lightning, as above
