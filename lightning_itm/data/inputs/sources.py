"""The images that a set is given, in whatever form, before any of them is opened."""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from os import PathLike, fspath
from typing import Any

import numpy as np
from PIL import Image

from lightning_itm.data.image import ImageFile, UnreadableImageError

FEW_IN_A_FOLDER = 50
"""So few files are looked for one by one. Of more, the folder is listed."""


class LazyImages(Sequence[Any]):
    """Read images that are decoded whenever they are asked for, such as a column of a Hugging Face data set.

    Args:
        images: Any object with a length and with items by number.
    """

    def __init__(self, images: Sequence[Any]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, image_id: Any) -> Any:
        try:
            return self.images[image_id]
        except MemoryError:
            raise  # that says nothing about the image
        except Exception as error:  # the decoder is theirs, and may raise anything
            raise UnreadableImageError(
                f"Image {image_id} of {type(self.images).__name__} does not open: {error}"
            ) from error


def by_number(images: Sequence[Any]) -> Sequence[Any]:
    """Return images that are read by their number, without decoding any but the first.

    Args:
        images: A list, or another sequence. One whose items are paths becomes a list, and so does what pandas made, which is
            indexed by labels. Others stay as they are.

    Raises:
        TypeError: if the first item of another sequence can't be an image.
    """
    is_stored = isinstance(images, list | tuple | np.ndarray | Mapping) or hasattr(images, "iloc")
    if is_stored or not (hasattr(images, "__getitem__") and hasattr(images, "__len__")) or len(images) == 0:
        return list(images)
    lazy = LazyImages(images)
    with suppress(UnreadableImageError):
        first = lazy[0]
        check_sources([first])  # the others are of the same kind, as far as can be told without decoding them
        if isinstance(first, str | PathLike):
            return list(images)
    return lazy


def check_sources(images: Sequence[Any]) -> None:
    """Raise if an entry can't be an image, before training starts. Files are not opened.

    Args:
        images: The images of a set. Those of :class:`LazyImages` are not looked at, because that would decode them.

    Raises:
        TypeError: if an entry is of another kind than ``ImageSource``, or an array of another dtype or shape.
        ValueError: if a path comes twice.
    """
    if isinstance(images, LazyImages):
        return
    first_index: dict[str, int] = {}
    for image_id, image in enumerate(images):
        if not isinstance(image, str | PathLike | bytes | Image.Image | np.ndarray | ImageFile):
            raise TypeError(
                f"Expected images to be paths, bytes, PIL images or arrays, got {type(image).__name__} for image {image_id}."
            )
        if isinstance(image, str | PathLike) and first_index.setdefault(str(image), image_id) != image_id:
            raise ValueError(
                f"Expected every image once, got {image} as image {first_index[str(image)]} and image {image_id}: its texts "
                "would be negatives of each other. Give a list of texts per image, or `text_image_id`; `from_csv` groups rows."
            )
        if isinstance(image, np.ndarray) and not _is_picture(image):
            raise TypeError(
                "Expected an array to be uint8 (height, width) or (height, width, 1, 3 or 4 channels), got "
                f"{image.dtype} {image.shape} for image {image_id}."
            )


def missing_files(paths: Iterable[tuple[int, str]]) -> list[int]:
    """Return which files do not exist. A million in a few folders take a few seconds, because each folder is listed once.

    Args:
        paths: The number and the path of each file.

    Returns:
        The numbers of those that do not exist, in order.
    """
    in_folder: dict[str, list[tuple[int, str]]] = {}
    for number, path in paths:
        folder, name = os.path.split(path)
        in_folder.setdefault(folder, []).append((number, name))
    missing: list[int] = []
    for folder, files in in_folder.items():
        found: set[str] = set()
        if len(files) > FEW_IN_A_FOLDER:
            with suppress(OSError), os.scandir(folder or ".") as entries:
                found.update(entry.name for entry in entries)
        # What is not in the list may exist under another spelling, where case or accents do not count.
        missing += [
            number for number, name in files if name not in found and not os.path.exists(os.path.join(folder, name))
        ]
    return sorted(missing)


def check_files(images: Sequence[Any], max_fraction: float) -> None:
    """Look for the files of images, before training starts. A few may be missing, with a warning.

    Args:
        images: The images of a set. Those that are no paths are not looked at.
        max_fraction: The fraction of them that may be missing.

    Raises:
        FileNotFoundError: if more are missing.
    """
    if isinstance(images, LazyImages):
        return
    names = {number: fspath(image) for number, image in enumerate(images) if isinstance(image, str | PathLike)}
    missing, num_images = missing_files(names.items()), len(images)
    if not missing:
        return
    first = ", ".join(names[number] for number in missing[:3])
    if len(missing) > max_fraction * num_images:
        raise FileNotFoundError(
            f"Expected at most {max_fraction:.1%} of the {num_images} images to be missing (`max_unreadable`), found no file "
            f"for {len(missing)}, the first: {first}. Is the folder right? Else leave them out."
        )
    warnings.warn(
        f"{len(missing)} of {num_images} images are missing, the first: {first}. In training, other pairs take the places of "
        "theirs. In evaluation, it is an error.",
        stacklevel=3,  # past `ImageTextDataset.__init__`
    )


def _is_picture(array: np.ndarray[Any, Any]) -> bool:
    return array.dtype == np.uint8 and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4)))
