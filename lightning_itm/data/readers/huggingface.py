"""Read a data set of the Hugging Face library ``datasets``: the texts at once, and each image when it is asked for."""

import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from lightning_itm.data.inputs.image_column import ImageColumn
from lightning_itm.data.readers.captions import shorten, split_captions

CAPTION_KEYS = ("raw", "caption", "text", "sentence")
"""By these a caption is found in a dict. Karpathy's splits have ``raw``, COCO has ``caption``."""

MISSING = 'Expected datasets, to read a Hugging Face data set, found none: `pip install "lightning_itm[datasets]"`.'


def read_huggingface(
    dataset: Any,
    image: str,
    captions: str,
    *,
    caption_key: str | None = None,
    image_id: str | None = None,
    image_root: str | PathLike[str] = ".",
    hard_captions: str | None = None,
) -> tuple[Sequence[Any], list[list[str]], list[list[str]] | None]:
    """Return the images of a data set, which are read when they are asked for, the captions of each, and its hard captions.

    Args:
        dataset: The ``datasets.Dataset``.
        image: The column of the images.
        captions: The column of the captions.
        caption_key: The key of a caption, where captions are dicts.
        image_id: The column that says which rows have the same image. Default: rows with the same path.
        image_root: The folder that paths start from.
        hard_captions: The column of the captions that are wrong for the image of their row. Default: there are none.

    Raises:
        TypeError: if the data set, or a column, is of another kind.
        ValueError: if a column is missing, if a row has no image, or if no image has a caption.
        ModuleNotFoundError: if ``datasets`` is not installed.
    """
    check_dataset(dataset, image, captions, *(name for name in (image_id, hard_captions) if name is not None))
    dataset = dataset.with_format(None)  # else numbers come as tensors
    column = ImageColumn(dataset, image, image_root)
    paths = column.paths()
    keys: Sequence[Any] = range(len(column)) if paths is None else paths
    keys = keys if image_id is None else _known(_values(dataset, image_id), image_id)
    texts, rows = _captions_of_images(_values(dataset, captions), keys, captions, caption_key)
    column.rows = np.asarray(rows)  # a list would be copied into every worker
    wrong = (
        None if hard_captions is None else _wrong_captions(_values(dataset, hard_captions), keys, rows, hard_captions)
    )
    return column if paths is None else [Path(image_root, paths[row]) for row in rows], texts, wrong


def check_dataset(dataset: Any, *columns: str) -> None:
    """Raise if a data set can't be read by number, or lacks a column: :func:`read_huggingface` says when."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(MISSING) from error
    if not isinstance(dataset, datasets.Dataset):
        way_out = "Load one with `datasets.load_dataset(..., split='train')`."
        if isinstance(dataset, dict):
            way_out = f"Give one of its splits, such as `dataset[{next(iter(dataset), 'train')!r}]`."
        elif isinstance(dataset, datasets.IterableDataset):
            way_out = "It can't be read by number. Load it without `streaming=True`, or write it into tar shards."
        raise TypeError(f"Expected a `datasets.Dataset`, got {type(dataset).__name__}. {way_out}")
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"Expected the data set to have the column {missing[0]!r}, got the columns {dataset.column_names}. Name yours "
            "with `image` and `captions`."
        )
    if dataset.format["type"] == "custom":
        raise ValueError(
            "Expected a data set without a function of `set_transform`, which would not be called here. Give "
            "`dataset.with_format(None)`, and what changes the images as `transform`."
        )


def load_saved(folder: str | PathLike[str], split: str) -> Any | None:
    """Return the data set of a folder that ``save_to_disk`` made, and None of any other folder.

    Args:
        folder: The folder.
        split: Which of several splits is read. ``"val"`` may be ``"validation"`` there.

    Raises:
        ValueError: if there are several splits, and not this one.
        ModuleNotFoundError: if ``datasets`` is not installed.
    """
    names = ("dataset_dict.json",), ("state.json", "dataset_info.json")
    if not any(all(Path(folder, name).is_file() for name in needed) for needed in names):
        return None
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(MISSING) from error
    dataset = datasets.load_from_disk(str(folder))
    if not isinstance(dataset, dict):
        return dataset
    # The second is the library's own name for it.
    found = [name for name in (["val", "validation"] if split == "val" else [split]) if name in dataset]
    if not found:
        raise ValueError(f"Expected `split` to be one of {list(dataset)}, the splits of {folder}, got {split!r}.")
    return dataset[found[0]]


def _captions_of_images(
    values: Sequence[Any], keys: Sequence[Any], column: str, caption_key: str | None
) -> tuple[list[list[str]], list[int]]:
    """Return the captions of each image that has one, and the first row of it. Warn of what is left out."""
    first_row: dict[Any, int] = {}
    texts_of: dict[Any, list[str]] = {}
    num_left_out, first_left_out = 0, ""
    for row, (key, value) in enumerate(zip(keys, values, strict=True)):
        texts, others = split_captions(_without_keys(value, caption_key, row, column))
        texts_of.setdefault(key, []).extend(texts)
        first_row.setdefault(key, row)
        if others and not num_left_out:
            first_left_out = f"row {row}: {shorten(others[0])}"
        num_left_out += len(others)
    kept = [key for key, texts in texts_of.items() if texts]
    left_out = f"what is no text is left out as a caption, {num_left_out} times, first in {first_left_out}"
    if not kept:
        what = f"; {left_out}" if num_left_out else ""
        raise ValueError(f"Expected at least one image with a caption in the column {column!r}, found none{what}.")
    if num_left_out:
        warnings.warn(
            f"In the column {column!r}, {left_out}. So {len(texts_of) - len(kept)} of {len(texts_of)} images have no caption "
            "and are left out, too.",
            stacklevel=4,  # past the reader and the classmethod: at the line that asked for the set
        )
    return [texts_of[key] for key in kept], [first_row[key] for key in kept]


def _wrong_captions(values: Sequence[Any], keys: Sequence[Any], rows: Sequence[int], column: str) -> list[list[str]]:
    """Return the wrong captions of each image, from all of its rows."""
    wrong: dict[Any, list[str]] = {}
    for row, (key, value) in enumerate(zip(keys, values, strict=True)):
        some = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(some, list) or not all(isinstance(text, str) for text in some):
            raise TypeError(
                f"Expected row {row} of the column {column!r} to have wrong captions, a text or a list of texts, got "
                f"{shorten(value)}. Put an empty list where there is none."
            )
        wrong.setdefault(key, []).extend(some)
    return [wrong[keys[row]] for row in rows]


def _without_keys(value: Any, key: str | None, row: int, column: str) -> Any:
    """Return a caption, or a list of them, without the dicts that they are in."""
    if isinstance(value, list):
        return [_without_keys(entry, key, row, column) if isinstance(entry, dict) else entry for entry in value]
    if not isinstance(value, dict):
        return value
    found = [name for name in (CAPTION_KEYS if key is None else (key,)) if name in value]
    if len(found) != 1:
        expected = f"the key {key!r}" if key is not None else f"one of the keys {list(CAPTION_KEYS)}"
        raise ValueError(
            f"Expected the captions in row {row} of the column {column!r} to be dicts with {expected}, got the keys "
            f"{list(value)}. Name the key of the caption with `caption_key`."
        )
    return value[found[0]]


def _values(dataset: Any, name: str) -> list[Any]:
    return list(dataset.select_columns(name)[:][name])


def _known(keys: list[Any], column: str) -> list[Any]:
    for row, key in enumerate(keys):
        if key is None or not isinstance(key, int | str):
            raise ValueError(
                f"Expected every row to have a number or a text in the column {column!r}, got {shorten(key)} in row {row}. "
                "Fill it in, or name another column with `image_id`."
            )
    return keys
