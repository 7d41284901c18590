"""Write pairs into tar shards, and check later that the shards are unchanged."""

import io
import json
import os
import warnings
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from webdataset import TarWriter

from lightning_itm.data.image import UnreadableImageError, open_rgb
from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.data.shards.paths import MANIFEST, find_shards, read_manifest, tar_files
from lightning_itm.data.shards.tar import TarMember

FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def write_shards(
    pairs: ImageTextDataset, folder: str | PathLike[str], *, images_per_shard: int = 1000, prefix: str = ""
) -> dict[str, Any]:
    """Write pairs into tar shards, each image once with all of its texts, and with their hard captions if there are some.

    JPEG, PNG and WebP files are copied byte for byte. Other images become PNG. A ``manifest.json`` beside the shards has the
    number of images, pairs and bytes of each shard, and its SHA-256. An image that does not open is left out, with its texts
    and with a warning.

    Args:
        pairs: The set that is written. Its images are stored as they are, without transforms.
        folder: The folder for the shards. It is made, and must not hold shards already.
        images_per_shard: How many images go into one shard. Shards of 100 MB to 1 GB are read best.
        prefix: The first part of the names of the shards, before a number of five digits, such as ``"train-"``.

    Returns:
        The manifest: ``{"images": ..., "pairs": ..., "shards": [{"name": ..., "sha256": ..., ...}, ...]}``.

    Raises:
        FileExistsError: if the folder holds shards already.
        ValueError: if ``images_per_shard`` is not positive.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> from lightning_itm import ImageTextDataset, write_shards
        >>> pairs = ImageTextDataset([Image.new("RGB", (8, 8), "red")], [["red", "a red square"]])
        >>> with TemporaryDirectory() as folder:
        ...     manifest = write_shards(pairs, folder)
        >>> manifest["images"], manifest["pairs"], manifest["shards"][0]["name"]
        (1, 2, '00000.tar')
    """
    if images_per_shard < 1:
        raise ValueError(f"Expected `images_per_shard` to be at least 1, got {images_per_shard}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tar_files(folder):
        raise FileExistsError(
            f"Expected a folder without shards, got {folder}. Nothing is overwritten: name another one."
        )
    order = pairs.text_image_id.argsort(stable=True)  # (texts,), stable: the texts of an image keep their order
    text_ids = [ids.tolist() for ids in order.split(torch.bincount(pairs.text_image_id).tolist())]  # one list per image
    shards: list[dict[str, Any]] = []
    left_out: list[str] = []
    for number, start in enumerate(range(0, len(pairs.images), images_per_shard)):
        name = f"{prefix}{number:05d}.tar"
        part = folder / f"{name}.part"  # not yet a shard: what breaks off in the middle is never read as one
        image_ids = range(len(pairs.images))[start : start + images_per_shard]
        counts = _write_shard(part, pairs, {image_id: text_ids[image_id] for image_id in image_ids}, left_out)
        shards.append({"name": name, **counts, "bytes": part.stat().st_size, "sha256": checksum(part)})
    if left_out:
        warnings.warn(
            f"{len(left_out)} of {len(pairs.images)} images do not open and are left out with their texts, the first: "
            f"{left_out[0]}. Where texts are missing, ids count anew from 0.",
            stacklevel=2,
        )
    for entry in shards:  # all at the end: only a whole set gets its names
        os.replace(folder / f"{entry['name']}.part", folder / entry["name"])
    totals = {name: sum(entry[name] for entry in shards) for name in ("images", "pairs")}
    manifest = {**totals, "shards": shards}
    part = folder / f"{MANIFEST}.part"
    part.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    os.replace(part, folder / MANIFEST)
    return manifest


def _write_shard(
    path: Path, pairs: ImageTextDataset, text_ids: dict[int, list[int]], left_out: list[str]
) -> dict[str, int]:
    counts = {"images": 0, "pairs": 0}
    # No times, so that the same pairs give the same bytes, and the same SHA-256.
    with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for image_id, ids in text_ids.items():
            try:
                data, ending = encoded_image(pairs.images[image_id])
            except UnreadableImageError as error:
                left_out.append(f"image {image_id}: {error}")
                continue
            facts = {"image_id": image_id, "text_ids": ids, "texts": [pairs.texts[text_id] for text_id in ids]}
            if pairs.hard_captions is not None:
                facts["hard_captions"] = [pairs.hard_captions.of(text_id, image_id) for text_id in ids]
            writer.write({"__key__": f"{image_id:09d}", ending: data, "json": json.dumps(facts).encode()})
            counts = {"images": counts["images"] + 1, "pairs": counts["pairs"] + len(ids)}
    return counts


def verify_shards(folder: str | PathLike[str]) -> None:
    """Compare every shard of a folder with its SHA-256 in the manifest.

    Args:
        folder: A folder that :func:`~lightning_itm.write_shards` wrote.

    Raises:
        ValueError: if the content of a shard has changed, or if the folder has no manifest.
        FileNotFoundError: if a shard of the manifest is missing.
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
    """Return an image as the bytes of a file, and the ending of that file.

    Raises:
        UnreadableImageError: if the image does not open.
    """
    if isinstance(source, bytes):
        data = source
    elif isinstance(source, TarMember):
        source.check()
        data = source.read_bytes()
    elif isinstance(source, str | PathLike):
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise UnreadableImageError(f"{source} does not open: {error}") from error
    else:
        data = b""
    if data:
        # Decoded once, because what does not open here would not open in training. The error names a path, if there is one.
        open_rgb(data if not isinstance(source, str | PathLike) else source)
        with Image.open(io.BytesIO(data)) as image:
            if image.format in FORMATS:
                return data, FORMATS[image.format]
    buffer = io.BytesIO()
    open_rgb(source).save(buffer, "PNG")
    return buffer.getvalue(), "png"


def checksum(path: Path) -> str:
    """Compute the SHA-256 of a file."""
    digest = sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):  # 1 MB at a time: a shard may be larger than the memory
            digest.update(part)
    return digest.hexdigest()
