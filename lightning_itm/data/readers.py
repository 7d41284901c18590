"""Read the forms in which people have images and texts into two lists: the paths, and the texts of each."""

import csv
import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_itm.data.image import IMAGE_ENDINGS

ImagesAndTexts = tuple[list[Path], list[list[str]]]


def read_karpathy(
    path: str | PathLike[str], image_root: str | PathLike[str], split: str | Sequence[str]
) -> ImagesAndTexts:
    """Read a split of a Karpathy JSON. ``"train"`` takes ``restval`` in, and a list of splits takes those alone."""
    entries = json.loads(Path(path).read_text(encoding="utf-8"))["images"]
    wanted = {"train", "restval"} if split == "train" else {split} if isinstance(split, str) else set(split)
    chosen = [entry for entry in entries if entry["split"] in wanted]
    if not chosen:
        there = sorted({entry["split"] for entry in entries})
        raise ValueError(f"Expected `split` to be one of {there}, the splits of {path}, got {split!r}.")
    # Only COCO's files have `filepath`, such as "val2014".
    images = [Path(image_root, entry.get("filepath", ""), entry["filename"]) for entry in chosen]
    _check_first(images, image_root)
    return images, [[sentence["raw"] for sentence in entry["sentences"]] for entry in chosen]


def read_table(
    path: str | PathLike[str], image_root: str | PathLike[str], image_column: str, text_column: str, delimiter: str
) -> ImagesAndTexts:
    """Read a CSV or TSV file with a header, one pair per row. Rows with the same image share it."""
    with open(path, newline="", encoding="utf-8-sig") as file:  # Excel begins with a byte-order mark
        rows = list(csv.DictReader(file, delimiter=delimiter))
    return _group_rows(rows, path, image_root, image_column, text_column)


def read_jsonl(
    path: str | PathLike[str], image_root: str | PathLike[str], image_column: str, text_column: str
) -> ImagesAndTexts:
    """Read one JSON object per line, whose text is a string or a list of strings."""
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return _group_rows(rows, path, image_root, image_column, text_column)


def read_folder(folder: str | PathLike[str]) -> ImagesAndTexts:
    """Read a folder of images, each with a ``.txt`` of the same name beside it, one text per line."""
    endings = {f".{ending}" for ending in IMAGE_ENDINGS}
    images = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in endings)
    if not images:
        raise FileNotFoundError(f"Expected images ({', '.join(sorted(endings))}) in {folder}, found none.")
    lacking = [path for path in images if not path.with_suffix(".txt").is_file()]
    if lacking:
        raise FileNotFoundError(
            f"Expected {lacking[0].with_suffix('.txt')} beside {lacking[0].name}, found none ({len(lacking)} of "
            f"{len(images)} images have no text). Write it, or move the image elsewhere."
        )
    # "utf-8-sig" leaves out the byte-order mark that Windows editors put first.
    lines = [path.with_suffix(".txt").read_text(encoding="utf-8-sig").splitlines() for path in images]
    return images, [[line for line in of_image if line.strip()] for of_image in lines]


def flatten_texts(
    texts: Sequence[str] | Sequence[Sequence[str]], text_image_id: Sequence[int] | None, num_images: int
) -> tuple[list[str], Tensor]:
    """Return the texts one after the other, and the image of each.

    Raises:
        ValueError: if texts or ids do not match the images in number, or if the ids are not dense.
        TypeError: if a text is no string.
    """
    if num_images == 0:
        raise ValueError("Expected at least one image, got none.")
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


def _group_rows(
    rows: list[dict[str, Any]],
    path: str | PathLike[str],
    image_root: str | PathLike[str],
    image_column: str,
    text_column: str,
) -> ImagesAndTexts:
    texts_of_image: dict[str, list[str]] = {}  # in the order in which each image comes first
    for number, row in enumerate(rows, 1):
        if row.get(image_column) is None or row.get(text_column) is None:
            raise ValueError(
                f"Expected row {number} of {path} to have {image_column!r} and {text_column!r}, got the columns "
                f"{list(row)}. Name yours with `image_column` and `text_column`."
            )
        texts = row[text_column]
        texts_of_image.setdefault(row[image_column], []).extend([texts] if isinstance(texts, str) else texts)
    images = [Path(image_root, image) for image in texts_of_image]
    _check_first(images, image_root)
    return images, list(texts_of_image.values())


def _check_first(images: list[Path], image_root: str | PathLike[str]) -> None:
    # Only the first: a wrong `image_root` is seen at once, and looking for a million files takes minutes.
    if images and not images[0].is_file():
        raise FileNotFoundError(
            f"Expected the first image at {images[0]}, found none. Is `image_root` {image_root} right?"
        )


def _check_strings(texts: Sequence[Any]) -> list[str]:
    for text_id, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"Expected every text to be a string, got {text!r} for text {text_id}. Leave it out, or fill it in."
            )
    return list(texts)
