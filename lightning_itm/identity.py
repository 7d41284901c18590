"""What tells one set of pairs from another, for states that refer to its ids: a checkpoint, a table, a memory bank."""

import os
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from torch import Tensor

_DIFFERENCES = {
    "texts in any order": "other texts",
    "texts": "another order of texts",
    "owners": "texts that belong to other images",
    "images in any order": "other images",
    "image names": "another order of images",
    "image sizes in bytes": "images of other sizes",
    "image sizes in memory": "images of other sizes",
    "hard captions": "other hard captions",
    "indices": "another part of the set",
}
"""What it means if an entry of an identity differs and the ones before it do not."""


def set_identity(
    texts: Iterable[str | bytes],
    text_image_id: Tensor,
    num_images: int,
    *,
    image_names: Sequence[str | bytes] | None = None,
    image_sizes: bytes = b"",
    size_unit: str = "bytes",
) -> dict[str, Any]:
    """Return what tells a set from another: numbers, texts, order, and the names of images.

    It is the same in each process and on each machine, and takes about two seconds for a million pairs. No image is read.

    Args:
        texts: The texts by their ids.
        text_image_id: The image that each text belongs to, int64 `(texts,)`.
        num_images: Number of images.
        image_names: The name of each image, such as those of :func:`relative_names`. None: images have no names.
        image_sizes: The sizes of the images, in any form, where they are known.
        size_unit: What the sizes count. Only those in the same unit are compared.

    Example:
        >>> import torch
        >>> from lightning_itm.identity import set_difference, set_identity
        >>> one = set_identity(["a dog", "a cat"], torch.tensor([0, 1]), 2)
        >>> set_difference(one, set_identity(["a cat", "a dog"], torch.tensor([0, 1]), 2))
        'another order of texts'
    """
    identity: dict[str, Any] = {"pairs": len(text_image_id), "images": num_images}
    identity["texts"], identity["texts in any order"] = _digests(texts)
    identity["owners"] = _digest(text_image_id.numpy().tobytes())
    if image_names is not None:
        identity["image names"], identity["images in any order"] = _digests(image_names)
    if image_sizes:
        identity[f"image sizes in {size_unit}"] = _digest(image_sizes)
    return identity


def image_identity(images: Any) -> dict[str, Any]:
    """Return ``image_names`` or ``image_sizes`` of a list of images, for :func:`set_identity`, without reading a file.

    Args:
        images: Paths, or images in memory: bytes, arrays, PIL images. What is no list has neither names nor sizes here. It may
            be a column that decodes each image that it is asked for.
    """
    if not isinstance(images, list):
        return {}
    if all(isinstance(image, str | os.PathLike) for image in images):
        return {"image_names": relative_names(images)}
    sizes = [len(image) if isinstance(image, bytes) else getattr(image, "size", None) for image in images]
    return {"image_sizes": repr(sizes).encode(), "size_unit": "memory"}


def relative_names(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Return paths from the folder on that all have in common, so that a set may be moved.

    Example:
        >>> from lightning_itm.identity import relative_names
        >>> relative_names(["/data/images/a/1.jpg", "/data/images/b/2.jpg"])
        ['a/1.jpg', 'b/2.jpg']
    """
    names = [os.fspath(path).replace(os.sep, "/") for path in paths]
    # What the first and the last in the order of letters have in common, all have.
    common = os.path.commonprefix([min(names, default=""), max(names, default="")])  # noqa: RUF071  # cut at a "/" below
    return [name[common.rfind("/") + 1 :] for name in names]


def identity_of(dataset: Any) -> dict[str, Any]:
    """Return the identity of a training set, with what wraps it. Of an unknown kind of set, only the number is known."""
    if dataset is None:
        return {}
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):  # a Subset
        indices = np.asarray(dataset.indices, dtype=np.int64)
        return {**identity_of(dataset.dataset), "pairs": len(indices), "indices": _digest(indices.tobytes())}
    identity = getattr(getattr(dataset, "pairs", dataset), "identity", None)
    if callable(identity):
        return dict(identity())
    return {"pairs": len(dataset)} if hasattr(dataset, "__len__") else {}


def set_difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Say in words how a set differs from that of a checkpoint. None: it does not, as far as both are known.

    Args:
        then: The identity of the set of the checkpoint. An older checkpoint may have none, or fewer entries.
        now: The identity of the set of this run.
    """
    for name in ("pairs", "images"):
        if name in then and name in now and then[name] != now[name]:
            return f"{now[name]} {name} instead of {then[name]}"
    changed = [
        words for name, words in _DIFFERENCES.items() if name in then and name in now and then[name] != now[name]
    ]
    return changed[0] if changed else None


def _digests(strings: Iterable[str | bytes]) -> tuple[str, str]:
    """Return a digest of the strings in their order, and one that does not depend on the order."""
    encoded = (part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass") for part in strings)
    each = b"".join([blake2b(part, digest_size=8).digest() for part in encoded])
    return _digest(each), f"{int(np.frombuffer(each, dtype='<u8').sum(dtype=np.uint64)):016x}"


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=8).hexdigest()
