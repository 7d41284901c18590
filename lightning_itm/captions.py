"""Which captions are equal, and which images have them.

An equal caption of another image is no negative: the data alone can't say that it is wrong. Captions are compared by number.
"""

import unicodedata
import warnings
from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor


def fold_caption(text: str) -> str:
    """Return a caption without what does not change its words: case, white space and the form of its Unicode signs.

    Two captions are equal where this is equal. It is NFKC, then case folding, then one space for each run of white space.

    Example:
        >>> from lightning_itm.captions import fold_caption
        >>> fold_caption(" A  Dog") == fold_caption("a dog"), fold_caption("A dog.") == fold_caption("a dog")
        (True, False)
    """
    if not text.isascii():  # once more after folding, which can leave a letter in two parts
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(text.lower().split())


def number_captions(texts: Iterable[str], text_image_id: Tensor) -> Tensor | None:
    """Number captions, so that equal ones have one number. Return None where no two images share a caption.

    A million captions take about two seconds, and 8 MB. What is compared is a hash of 64 bits: among a million
    captions, the chance that two different ones get one number is 1 in 30 million. Every process computes the same numbers.

    Args:
        texts: All captions of a set. An empty one is equal to no other.
        text_image_id: The image that each caption belongs to, int64 `(texts,)`.

    Returns:
        int64 `(texts,)`, from 0 in the order in which each caption comes first.

    Example:
        >>> import torch
        >>> from lightning_itm.captions import number_captions
        >>> number_captions(["a dog", "a cat", "A dog"], torch.tensor([0, 1, 2]))
        tensor([0, 1, 0])
        >>> number_captions(["a dog", "a cat", "A dog"], torch.tensor([0, 1, 0]))  # of one image: nothing to compare
    """
    hashes = np.fromiter((_hash(number, text) for number, text in enumerate(texts)), np.uint64, len(text_image_id))
    _, first, number = np.unique(hashes, return_index=True, return_inverse=True)
    rank = np.empty_like(first)
    rank[first.argsort()] = np.arange(len(first))  # hashes are in no order that a reader could follow
    caption_id = torch.from_numpy(rank[number]).long()  # (texts,)
    return caption_id if bool(is_shared(caption_id, text_image_id).any()) else None


def is_shared(caption_id: Tensor, text_image_id: Tensor) -> Tensor:
    """Tell which captions another image has, too, bool `(texts,)`.

    Args:
        caption_id: The number of each caption, int64 `(texts,)`. −1 stands for one that is not known, and is never shared.
        text_image_id: The image that each caption belongs to, int64 `(texts,)`.
    """
    known = caption_id.clamp_min(0)
    num = _num_captions(caption_id)
    # The lowest and the highest image of each caption are the same one where only one image has it.
    lowest, highest = (
        text_image_id.new_zeros(num).scatter_reduce(0, known[own], text_image_id[own], way, include_self=False)
        for own in [caption_id >= 0]
        for way in ("amin", "amax")
    )
    return (lowest != highest)[known] & (caption_id >= 0)


def captions_of_images(caption_id: Tensor, text_image_id: Tensor, num_images: int) -> Tensor:
    """List the captions of each image that another image has, too. The others are equal to none, and left out.

    Args:
        caption_id: The number of each caption, int64 `(texts,)`, −1 for one that is not known.
        text_image_id: The image that each caption belongs to, int64 `(texts,)`.
        num_images: Number of images.

    Returns:
        int64 `(images, most)`, where ``most`` is the largest number of such captions of an image, and at least 1. Rows are
        filled up with −1.

    Example:
        >>> import torch
        >>> from lightning_itm.captions import captions_of_images
        >>> captions_of_images(torch.tensor([0, 1, 0, 2]), torch.tensor([0, 0, 1, 2]), num_images=3)
        tensor([[ 0],
                [ 0],
                [-1]])
    """
    shared = is_shared(caption_id, text_image_id)
    # Each image and each of its captions as one number, so that they are sorted by image, and none comes twice.
    num = _num_captions(caption_id)
    pairs = (text_image_id[shared] * num + caption_id[shared]).unique()
    owner, number = pairs // num, pairs % num
    count = torch.bincount(owner, minlength=num_images)  # (images,)
    column = torch.arange(len(owner), device=owner.device) - (count.cumsum(0) - count)[owner]
    rows = caption_id.new_full((num_images, max(1, int(count.max()))), -1)
    rows[owner, column] = number
    return rows


def warn_of_equal_captions(caption_id: Tensor, text_image_id: Tensor, *, stacklevel: int) -> None:
    """Warn how many pairs share their caption with another image, at the line that made the set."""
    number, total = int(is_shared(caption_id, text_image_id).sum()), len(caption_id)
    warnings.warn(
        f"{number:,} of {total:,} pairs share their caption with another image. They are no negatives of each other, but "
        "recall counts one as a wrong result for the other, as in papers. `ImageTextRetrieval(equal_captions='right')` counts "
        "it as right. To have them as negatives, give the dataset `equal_captions='keep'`.",
        stacklevel=stacklevel + 1,
    )


def _hash(number: int, text: str) -> int:
    folded = fold_caption(text) or f"\0{number}"
    return int.from_bytes(blake2b(folded.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _num_captions(caption_id: Tensor) -> int:
    return max(1, int(caption_id.max()) + 1) if len(caption_id) else 1
