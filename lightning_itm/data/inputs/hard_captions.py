"""Captions that are wrong for an image, such as rewritten ones, and a draw from them."""

import warnings
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from lightning_itm.captions import fold_caption
from lightning_itm.data.inputs.packed_strings import PackedStrings


class HardCaptionLists:
    """Hold the wrong captions of each text, or of each image, and draw from them.

    Args:
        captions: One list of strings per text, or one per image. A list may be empty. Where there are as many texts as images,
            it is one per text.
        texts: All texts of the set.
        text_image_id: The image that each text belongs to, int64 `(texts,)`.
        num_images: Number of images.
        num_drawn: How many are drawn for each pair.

    Raises:
        ValueError: if the lists match neither the texts nor the images in number, if none is left, or if ``num_drawn`` is too
            small.
        TypeError: if an entry is no list of strings.
    """

    def __init__(
        self,
        captions: Sequence[Sequence[str]],
        texts: Sequence[str],
        text_image_id: Tensor,
        num_images: int,
        num_drawn: int,
    ) -> None:
        if not isinstance(num_drawn, int) or num_drawn < 1:
            raise ValueError(f"Expected `num_hard_captions` to be at least 1, got {num_drawn!r}. Typical: 1.")
        lists = list(captions)
        if len(lists) not in (len(texts), num_images):
            raise ValueError(
                f"Expected `hard_captions` to have one list for each of the {len(texts)} texts, or {num_images} images, got "
                f"{len(lists)} lists. Give an empty list where there is none."
            )
        self.num_drawn, self.is_of_texts = num_drawn, len(lists) == len(texts)
        kept = _without_own(lists, texts, text_image_id.tolist(), of_texts=self.is_of_texts)
        self.end = torch.tensor([len(some) for some in kept]).cumsum(0)
        self.strings = PackedStrings.pack([text for some in kept for text in some])
        if not len(self.strings):
            raise ValueError("Expected `hard_captions` to have at least one caption, got none. Leave the argument out.")

    def of(self, text_id: int, image_id: int) -> list[str]:
        """Return the wrong captions of a pair."""
        row = text_id if self.is_of_texts else image_id
        return list(self.strings[int(self.end[row - 1]) if row else 0 : int(self.end[row])])

    def draw(self, text_id: int, image_id: int, own: Any, encode: Callable[[str], Any]) -> dict[str, Any]:
        """Draw from the wrong captions of a pair, each at most once, with PyTorch's random numbers.

        Args:
            text_id: The text of the pair.
            image_id: Its image.
            own: The encoded text of the pair, which stands where there is no wrong caption.
            encode: Encodes a caption.

        Returns:
            ``text``, the encoded captions, and ``mask``, bool `(num_drawn,)`, False where there is none.
        """
        there = self.of(text_id, image_id)
        drawn = [encode(there[number]) for number in torch.randperm(len(there))[: self.num_drawn].tolist()]
        mask = torch.arange(self.num_drawn) < len(drawn)
        drawn += [own] * (self.num_drawn - len(drawn))
        return {"text": torch.stack(drawn) if isinstance(own, Tensor) else drawn, "mask": mask}

    def digest(self) -> str:
        """Return what tells these lists from others."""
        return blake2b(self.strings.data.numpy().tobytes() + self.end.numpy().tobytes(), digest_size=8).hexdigest()


def _without_own(
    lists: Sequence[Any], texts: Sequence[str], owner: Sequence[int], *, of_texts: bool
) -> list[list[str]]:
    """Return the lists without what equals a caption of the image, and without blank strings. Warn how many there are."""
    own: dict[int, set[str]] = {}
    for image_id, text in zip(owner, texts, strict=True):
        own.setdefault(image_id, set()).add(fold_caption(text))
    kept, left_out = [], []
    for row, some in enumerate(lists):
        if not isinstance(some, list | tuple) or not all(isinstance(text, str) for text in some):
            raise TypeError(
                f"Expected every entry of `hard_captions` to be a list of strings, got {some!r} as entry {row}. Give an empty "
                "list where there is none."
            )
        right = own[owner[row] if of_texts else row]
        good = [text for text in some if text.strip() and fold_caption(text) not in right]
        left_out += [(row, text) for text in some if text not in good]
        kept.append(good)
    if left_out:
        total = sum(len(some) for some in lists)
        warnings.warn(
            f"{len(left_out)} of {total} hard captions are empty or equal a caption of their image, and are left out, the "
            f"first in entry {left_out[0][0]}: {left_out[0][1]!r}.",
            stacklevel=4,  # past the constructors: where the set was made
        )
    return kept
