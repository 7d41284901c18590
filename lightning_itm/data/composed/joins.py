"""Join sets of pairs, or split one, so that ids are dense again and never collide."""

from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import ConcatDataset

# The functions below import the classes, whose base has these functions as methods.
if TYPE_CHECKING:
    from lightning_itm.data.composed.dataset import ComposedDataset
    from lightning_itm.data.pairs import ImageTextDataset


class Joinable:
    """Give a set of pairs the ways to join and split it. :class:`~lightning_itm.ImageTextDataset` has them from here."""

    def __add__(self, other: Any) -> Any:
        """Join two sets, as :meth:`concatenate` does. PyTorch's way would let two images have one id."""
        return self.concatenate(self, other)

    @staticmethod
    def concatenate(*parts: Any) -> "ComposedDataset":
        """Join sets to one with ids of its own: :func:`concatenate`."""
        return concatenate(*parts)

    def split(self, fraction: float, seed: int = 0) -> "tuple[ComposedDataset, ComposedDataset]":
        """Return two sets without a common image, the first with ``fraction`` of the images: :func:`split`."""
        return split(cast("ImageTextDataset", self), fraction, seed)


def concatenate(*parts: "ImageTextDataset") -> "ComposedDataset":
    """Join sets to one whose ids are dense again: first all images of the first set, then those of the next.

    Args:
        parts: The sets. Each keeps its own transforms and tokenizer.

    Raises:
        TypeError: if a part is no :class:`~lightning_itm.ImageTextDataset`.
        ValueError: if there is no part, a path is in two of them, or a part has remote shards.
    """
    from lightning_itm.data.composed.dataset import ComposedDataset, check_parts

    check_parts(parts)
    return ComposedDataset(parts, [torch.arange(len(part.images)) for part in parts])


def split(pairs: "ImageTextDataset", fraction: float, seed: int = 0) -> "tuple[ComposedDataset, ComposedDataset]":
    """Split a set by its images, so that no image is in both parts, nor texts of one image in two.

    Args:
        pairs: The set.
        fraction: The fraction of the images that the first part gets, in (0, 1), such as 0.9.
        seed: Another seed gives another split.

    Returns:
        The first part and the rest. In each, images keep their order, and ids are dense again.

    Raises:
        ValueError: if ``fraction`` is out of its range, or if a part would have no image.
    """
    from lightning_itm.data.composed.dataset import ComposedDataset

    num_images = len(pairs.images)
    num_first = round(fraction * num_images)
    if not 0 < fraction < 1 or not 0 < num_first < num_images:
        raise ValueError(
            f"Expected `fraction` to leave images in both parts, got {fraction} of {num_images} images. Typical: 0.9."
        )
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))
    first, second = order[:num_first].sort().values, order[num_first:].sort().values
    return ComposedDataset([pairs], [first]), ComposedDataset([pairs], [second])


def check_ids(**datasets: Any) -> None:
    """Raise if a set is joined of several in a way in which two images have one id.

    Args:
        **datasets: What a data module got as its sets, by the names of its arguments.

    Raises:
        MisconfigurationException: if one is a list of sets, or a ConcatDataset of several.
    """
    for name, dataset in datasets.items():
        parts = dataset.datasets if isinstance(dataset, ConcatDataset) else dataset
        is_joined = isinstance(parts, list | tuple) and any(isinstance(part, Joinable) for part in parts)
        if is_joined and not (isinstance(dataset, ConcatDataset) and len(parts) == 1):
            raise MisconfigurationException(
                f"Expected `{name}` to be one set, got a {type(dataset).__name__} of {len(parts)}, in which ids come twice. "
                "Join them with `ImageTextDataset.concatenate(a, b)`."
            )
