"""Image-text pairs in tar shards, as webdataset and img2dataset write them, with random access."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from typing import Any, Literal

from PIL import Image

from lightning_itm.data.inputs.hard_captions import HardCaptionLists
from lightning_itm.data.inputs.packed_strings import PackedStrings
from lightning_itm.data.pairs import ImageTextDataset, UnreadablePairError
from lightning_itm.data.shards.captions import unpack_hard_captions
from lightning_itm.data.shards.index import ShardIndex
from lightning_itm.data.shards.paths import check_present, is_remote
from lightning_itm.data.shards.tar import TarMember
from lightning_itm.identity import set_identity


class ShardDataset(ImageTextDataset):
    """Read image-text pairs from uncompressed tar shards by id. One item is one text with its image.

    The shards are those that :func:`~lightning_itm.write_shards` and img2dataset write. Each sample has an image (``.jpg``,
    ``.png`` or ``.webp``), and a ``.txt`` with one text, or a ``.json`` with ``"texts"`` or ``"caption"``. At the first use,
    all shards are read once, and an index is written. Later, an image is read from its place in a local shard. Remote shards
    can only be read from front to back: wrap this dataset in a :class:`~lightning_itm.ShardStream`.

    Samples without an image or without a text are left out. A warning names the first of each kind, and ``contents.faults``
    counts them. If no text is missing, each text has the id that it had when :func:`~lightning_itm.write_shards` wrote it.
    Otherwise ids count from 0 in the order of the shards.

    Args:
        shards: A folder, a pattern such as ``"train/{00000..00031}.tar"``, a path or an address, or a list of these.
        index: The file of the index. By default, it lies beside the first shard. Remote shards need one.
        transform: Turns a PIL image into what the image tower takes, in training. Default: a float tensor
            `(3, height, width)` in [0, 1].
        eval_transform: Replaces ``transform`` in validation, test and mining, usually without augmentation. Default:
            ``transform``.
        tokenizer: Turns a list of one text into a tensor `(1, length)`, as open_clip's do. Default: texts stay strings.
        equal_captions: ``"exclude"`` or ``"keep"`` captions of several images, as :class:`~lightning_itm.ImageTextDataset`.
        max_unreadable: The fraction of pairs that may be unreadable in training. Above it, reading ends with an error.
        hard_captions: Read the wrong captions that a ``.json`` has as ``"hard_captions"``: one list for each text. They are
            further negatives, as in :class:`~lightning_itm.ImageTextDataset`. An index from before is built anew.
        num_hard_captions: How many of them are drawn per pair and epoch.

    Raises:
        FileNotFoundError: if a local shard does not exist.
        ValueError: if no sample can be used, if ``hard_captions`` is set and there is none, or if the shards are remote and
            ``index`` is not given.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> from lightning_itm import ImageTextDataset, ShardDataset, write_shards
        >>> with TemporaryDirectory() as folder:
        ...     _ = write_shards(ImageTextDataset([Image.new("RGB", (8, 8))], [["a black square"]]), folder)
        ...     sample = ShardDataset(folder)[0]
        >>> sample["text"], tuple(sample["image"].shape), sample["image_id"]
        ('a black square', (3, 8, 8), 0)
    """

    def __init__(
        self,
        shards: str | PathLike[str] | Sequence[str | PathLike[str]],
        *,
        index: str | PathLike[str] | None = None,
        transform: Callable[[Image.Image], Any] | None = None,
        eval_transform: Callable[[Image.Image], Any] | None = None,
        tokenizer: Callable[[list[str]], Any] | None = None,
        equal_captions: Literal["exclude", "keep"] = "exclude",
        max_unreadable: float = 0.05,
        hard_captions: bool = False,
        num_hard_captions: int = 1,
    ) -> None:
        self.contents = ShardIndex.open(shards, index, hard_captions=hard_captions)
        self.images = TarImages(self.contents)
        self.texts, self.text_image_id = self.contents.text, self.contents.text_image_id
        self._set_up(transform, eval_transform, tokenizer, equal_captions, max_unreadable)
        warn_of_faults(self.contents)
        if hard_captions and self.contents.hard_captions is not None:
            lists = unpack_hard_captions(*self.contents.hard_captions)
            parts = self.texts, self.text_image_id, len(self.images)
            self.hard_captions = HardCaptionLists(lists, *parts, num_hard_captions)

    @property
    def is_local(self) -> bool:
        """Whether all shards are local, so that any image can be read at any time."""
        return not any(is_remote(shard) for shard in self.contents.shards)

    def identity(self) -> dict[str, Any]:
        """Return what tells these shards from others. Images count by key and size."""
        if self._identity is None:
            contents = self.contents
            names, sizes = list(_encoded(contents.key)), contents.size.numpy().tobytes()
            parts = _encoded(contents.text), self.text_image_id, len(names)
            self._identity = set_identity(*parts, image_names=names, image_sizes=sizes)
            if self.hard_captions is not None:
                self._identity["hard captions"] = self.hard_captions.digest()
        return self._identity

    def load_image(self, image_id: int) -> Any:
        """Return one image, transformed as for training, or for evaluation in a view of :meth:`evaluation`.

        Raises:
            RuntimeError: if the shard of the image is remote, or was replaced since it was indexed.
            FileNotFoundError: if the shard of the image is gone.
            UnreadablePairError: if the image does not open.
        """
        source = self.images[image_id]
        if is_remote(source.path):
            raise RuntimeError(
                f"Expected local shards to read image {image_id} at random, got {source.path}. Train with a ShardStream, and "
                "copy sets for validation and test to a disk."
            )
        source.check()
        try:
            return self._open(image_id, source)
        except UnreadablePairError:
            check_present(self.contents.shards, self.contents.shard_of(image_id))  # a whole shard is more than a pair
            raise

    def load_data(self, image_id: int, data: bytes | None) -> Any:
        """Return one image whose bytes were read from its shard already.

        Args:
            image_id: The id of the image.
            data: The bytes of the image file, or ``None`` if it is no longer in its shard.

        Raises:
            UnreadablePairError: if the image does not open, or is no longer in its shard.
        """
        if data is None:
            raise UnreadablePairError(f"Image {image_id} is no longer in its shard ({self.images[image_id]})")
        try:
            return self._open(image_id, data)
        except UnreadablePairError as error:  # bytes have no name: say which file they are of
            raise UnreadablePairError(f"{error} ({self.images[image_id]})") from error


def _encoded(strings: PackedStrings) -> Iterator[bytes]:
    """Yield packed strings in UTF-8, much faster than one by one."""
    data, start = strings.data.numpy().tobytes(), 0
    for end in strings.end.tolist():
        yield data[start:end]
        start = end


class TarImages(Sequence[TarMember]):
    """Give the place of each image by its id. No list is kept: a million entries would be copied into every worker."""

    def __init__(self, index: ShardIndex) -> None:
        self.contents = index

    def __len__(self) -> int:
        return len(self.contents.key)

    def __getitem__(self, image_id: Any) -> Any:
        return self.contents.member(range(len(self))[image_id])


def warn_of_faults(index: ShardIndex) -> None:
    """Warn once if samples are left out of a set of shards, and name the first of each kind."""
    if index.faults:
        number = sum(index.faults.values())
        kinds = "; ".join(
            f"{count} {kind} (the first: {index.first_fault[kind]})" for kind, count in index.faults.items()
        )
        warnings.warn(
            f"{number} samples or captions of {len(index.shards)} shards can't be used and are left out, beside "
            f"{len(index.key)} images that can: {kinds}. A key is a name up to its first dot; the files of a key stand side "
            "by side.",
            stacklevel=3,  # at the line that made the dataset
        )
