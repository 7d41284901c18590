"""Bring texts that are given in Python into one form: a flat list, and the image of each."""

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor


def flatten_texts(
    texts: Sequence[str] | Sequence[Sequence[str]], text_image_id: Sequence[int] | None, num_images: int
) -> tuple[list[str], Tensor]:
    """Return the texts one after the other, and the image of each.

    Raises:
        ValueError: if texts or ids do not match the images in number, or if the ids are not dense.
        TypeError: if a text is no string, or if the texts are no sequence.
    """
    if num_images == 0:
        raise ValueError("Expected at least one image, got none.")
    # Each of these can be iterated: over its keys, its letters, or in any order.
    if isinstance(texts, str | bytes | Mapping | Set):
        raise TypeError(f"Expected `texts` to be a list with one entry per image, got {type(texts).__name__}.")
    texts = list(texts)
    if text_image_id is None:
        if len(texts) != num_images:
            raise ValueError(
                f"Expected one text, or one list of texts, for each of the {num_images} images, got {len(texts)}. "
                "Give `text_image_id` if the texts are a flat list."
            )
        lists = [list(entry) if isinstance(entry, list | tuple) else [entry] for entry in texts]
        empty = [image_id for image_id, entry in enumerate(lists) if not entry]
        if empty:
            raise ValueError(
                f"Expected every image to have a text, got an empty list for image {empty[0]} "
                f"({len(empty)} of {num_images}). Leave out images without a text."
            )
        flat = _check_strings([text for entry in lists for text in entry])
        return flat, torch.repeat_interleave(torch.tensor([len(entry) for entry in lists]))  # ids (texts,)
    ids = torch.as_tensor(list(text_image_id), dtype=torch.int64)
    if len(ids) != len(texts):
        raise ValueError(f"Expected one `text_image_id` for each of the {len(texts)} texts, got {len(ids)}.")
    if not torch.equal(ids.unique(), torch.arange(num_images)):
        raise ValueError(
            f"Expected `text_image_id` to be dense: every number from 0 to {num_images - 1}, the last image, at least "
            f"once, and no other. Got {ids.unique().numel()} numbers from {int(ids.min())} to {int(ids.max())}. "
            "Leave out images without a text, and number the rest from 0."
        )
    return _check_strings(texts), ids


def _check_strings(texts: Sequence[Any]) -> list[str]:
    for text_id, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"Expected every text to be a string, got {text!r} for text {text_id}. Leave it out, or fill it in."
            )
    return list(texts)
