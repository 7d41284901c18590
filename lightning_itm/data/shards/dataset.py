"""Image-text pairs in tar shards, as webdataset and img2dataset write them: write, and read by number."""

import io
import json
import os
import warnings
from collections.abc import Callable, Sequence
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from webdataset import TarWriter

from lightning_itm.data.image import UnreadableImageError, open_rgb
from lightning_itm.data.pairs import ImageTextPairs, UnreadablePairError
from lightning_itm.data.shards.index import ShardIndex
from lightning_itm.data.shards.tar import MANIFEST, TarMember, find_shards, is_remote, read_manifest

FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


class ShardPairs(ImageTextPairs):
    """Image-text pairs in uncompressed tar shards, by number. One item is one text with its image.

    A sample of a shard is an image (``.jpg``, ``.png``, ``.webp``) and a ``.txt``, which is one text, or a ``.json`` with
    ``"texts"`` or ``"caption"``: what :func:`write_shards` and img2dataset write. What is where is read once and kept beside
    the shards; images are read from local shards at random, texts are mapped from the index. Remote shards are for
    :class:`~lightning_itm.ShardStream` alone.

    Samples without image or without text are left out, counted in ``contents.faults``, and named in a warning. A text keeps
    the id that it had when :func:`write_shards` wrote it, as long as all texts are there; else ids count from 0 in the order
    of the shards.

    Args:
        shards: A folder, a pattern such as ``"train/{00000..00031}.tar"``, a path or an address, or a list of these.
        index: The file that says what is where; default: beside the first shard. Remote shards need one.
        transform: As for :class:`ImageTextPairs`, also the next two.
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
        """Return one image, as :class:`ImageTextPairs` does.

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


def write_shards(
    pairs: ImageTextPairs, folder: str | PathLike[str], *, images_per_shard: int = 1000, prefix: str = ""
) -> dict[str, Any]:
    """Write pairs into tar shards, each image once with all of its texts.

    JPEG, PNG and WebP files are copied as they are; other images become PNG. Beside the shards goes a ``manifest.json`` with
    the number of images, pairs and bytes of each shard, and its SHA-256.

    Args:
        pairs: What is written; not its transforms.
        folder: Where to.
        images_per_shard: Images a shard.
        prefix: What the names of the shards start with, before a number of five digits.

    Returns:
        The manifest.

    Raises:
        FileExistsError: There are shards in the folder.
        ValueError: ``images_per_shard`` is not positive.
    """
    if images_per_shard < 1:
        raise ValueError(f"Expected `images_per_shard` to be at least 1, got {images_per_shard}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tar")):
        raise FileExistsError(
            f"Expected a folder without shards, got {folder}. Nothing is overwritten: name another one."
        )
    order = pairs.text_image_id.argsort(stable=True)
    text_ids = [ids.tolist() for ids in order.split(torch.bincount(pairs.text_image_id).tolist())]
    shards: list[dict[str, Any]] = []
    left_out: list[str] = []
    for number, start in enumerate(range(0, len(pairs.images), images_per_shard)):
        name, counts = f"{prefix}{number:05d}.tar", {"images": 0, "pairs": 0}
        part = folder / f"{name}.part"
        with open(part, "wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
            for image_id in range(len(pairs.images))[start : start + images_per_shard]:
                try:
                    data, ending = encoded_image(pairs.images[image_id])
                except UnreadableImageError as error:
                    left_out.append(f"image {image_id}: {error}")
                    continue
                ids = text_ids[image_id]
                facts = {"image_id": image_id, "text_ids": ids, "texts": [pairs.texts[text_id] for text_id in ids]}
                writer.write({"__key__": f"{image_id:09d}", ending: data, "json": json.dumps(facts).encode()})
                counts = {"images": counts["images"] + 1, "pairs": counts["pairs"] + len(ids)}
        shards.append({"name": name, **counts, "bytes": part.stat().st_size, "sha256": checksum(part)})
    if left_out:
        warnings.warn(
            f"{len(left_out)} of {len(pairs.images)} images do not open and are left out with their texts, the first: "
            f"{left_out[0]}. Where texts are missing, ids count anew from 0.",
            stacklevel=2,
        )
    for entry in shards:  # all at the end: what broke off in between is no set
        os.replace(folder / f"{entry['name']}.part", folder / entry["name"])
    totals = {name: sum(entry[name] for entry in shards) for name in ("images", "pairs")}
    manifest = {**totals, "shards": shards}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def verify_shards(folder: str | PathLike[str]) -> None:
    """Compare shards with their manifest.

    Raises:
        ValueError: A shard is not what was written, or there is no manifest.
        FileNotFoundError: A shard is not there.
    """
    manifest = read_manifest(Path(folder))
    if manifest is None:
        raise ValueError(f"Expected {MANIFEST} in {folder}, found none. Only `write_shards` writes one.")
    find_shards(folder)
    wrong = [entry["name"] for entry in manifest["shards"] if checksum(Path(folder, entry["name"])) != entry["sha256"]]
    if wrong:
        raise ValueError(
            f"Expected every shard as it was written, got another content in {', '.join(wrong)}. Copy it again."
        )


def encoded_image(source: Any) -> tuple[bytes, str]:
    """Return the bytes of an image file, and its ending.

    Raises:
        UnreadableImageError: It does not open.
    """
    if isinstance(source, bytes):
        data = source
    elif isinstance(source, TarMember):
        data = source.read_bytes()
    elif isinstance(source, str | PathLike):
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise UnreadableImageError(f"{source} does not open: {error}") from error
    else:
        data = b""
    if data:
        open_rgb(data if not isinstance(source, str | PathLike) else source)  # or nobody could, later
        with Image.open(io.BytesIO(data)) as image:
            if image.format in FORMATS:
                return data, FORMATS[image.format]
    buffer = io.BytesIO()
    open_rgb(source).save(buffer, "PNG")
    return buffer.getvalue(), "png"


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


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
