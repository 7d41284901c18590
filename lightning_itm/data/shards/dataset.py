"""Image-text pairs in tar shards, as webdataset and img2dataset write them, by number."""

import warnings
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

from PIL import Image
from torch import Tensor

from lightning_itm.data.pairs import ImageTextDataset, UnreadablePairError
from lightning_itm.data.shards.index import ShardIndex
from lightning_itm.data.shards.paths import is_remote
from lightning_itm.data.shards.tar import TarMember


class ShardDataset(ImageTextDataset):
    """Image-text pairs in uncompressed tar shards, by number. One item is one text with its image.

    A sample of a shard is an image (``.jpg``, ``.png``, ``.webp``) and a ``.txt``, which is one text, or a ``.json`` with
    ``"texts"`` or ``"caption"``: what :func:`~lightning_itm.write_shards` and img2dataset write. What is where is read once
    and kept beside the shards; images are read from local shards at random, texts are mapped from the index. Remote shards are
    for :class:`~lightning_itm.ShardStream` alone.

    Samples without image or without text are left out, counted in ``contents.faults``, and named in a warning. A text keeps
    the id that it had when :func:`~lightning_itm.write_shards` wrote it, as long as all texts are there; else ids count from
    0 in the order of the shards.

    Args:
        shards: A folder, a pattern such as ``"train/{00000..00031}.tar"``, a path or an address, or a list of these.
        index: The file that says what is where; default: beside the first shard. Remote shards need one.
        transform: As for :class:`ImageTextDataset`, also the next two.
        eval_transform: For validation, test and mining.
        tokenizer: Of the texts.

    Raises:
        FileNotFoundError: A shard is not there.
        ValueError: No sample can be used.
    """

    def __init__(
        self,
        shards: str | PathLike[str] | Sequence[str | PathLike[str]],
        *,
        index: str | PathLike[str] | None = None,
        transform: Callable[[Image.Image], Any] | None = None,
        eval_transform: Callable[[Image.Image], Any] | None = None,
        tokenizer: Callable[[list[str]], Tensor] | None = None,
    ) -> None:
        self.contents = ShardIndex.open(shards, index)
        self.images = TarImages(self.contents)
        self.texts, self.text_image_id = self.contents.text, self.contents.text_image_id
        self._set_up(transform, eval_transform, tokenizer)
        warn_of_faults(self.contents)

    @property
    def is_local(self) -> bool:
        """Whether images can be read at random."""
        return not any(is_remote(shard) for shard in self.contents.shards)

    def load_image(self, image_id: int) -> Any:
        """Return one image, as :class:`ImageTextDataset` does.

        Raises:
            RuntimeError: The shard is remote.
            UnreadablePairError: It does not open.
        """
        source = self.images[image_id]
        if is_remote(source.path):
            raise RuntimeError(
                f"Expected local shards to read image {image_id} at random, got {source.path}. Train with a ShardStream, and "
                "copy sets for validation and test to a disk."
            )
        return self._open(image_id, source)

    def load_data(self, image_id: int, data: bytes) -> Any:
        """Return an image whose bytes were read already.

        Raises:
            UnreadablePairError: It does not open.
        """
        try:
            return self._open(image_id, data)
        except UnreadablePairError as error:
            raise UnreadablePairError(f"{error} ({self.images[image_id]})") from error

    def missing(self, image_id: int) -> str:
        """Say that an image is no longer where it was."""
        return f"Image {image_id} is no longer in its shard ({self.images[image_id]})"


class TarImages(Sequence[TarMember]):
    """Where each image is, by number."""

    def __init__(self, index: ShardIndex) -> None:
        self.contents = index

    def __len__(self) -> int:
        return len(self.contents.key)

    def __getitem__(self, image_id: Any) -> Any:
        return self.contents.member(range(len(self))[image_id])


def warn_of_faults(index: ShardIndex) -> None:
    """Say once what is left out of a set of shards, and where it starts."""
    if index.faults:
        number = sum(index.faults.values())
        kinds = "; ".join(
            f"{count} {kind} (the first: {index.first_fault[kind]})" for kind, count in index.faults.items()
        )
        warnings.warn(
            f"{number} samples of {len(index.shards)} shards can't be used and are left out, beside "
            f"{len(index.key)} that can: {kinds}. A key is a name up to its first dot; the files of a key stand side by side.",
            stacklevel=3,
        )
