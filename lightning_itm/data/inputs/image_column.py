"""A column of images of a Hugging Face data set, each read when it is asked for."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np


class ImageColumn(Sequence[Any]):
    """Read the images of a column by their number. Only the row that is asked for is read from the disk.

    Args:
        dataset: The ``datasets.Dataset``.
        name: The column. Its values are images of the feature ``datasets.Image``, bytes or paths.
        image_root: The folder that paths start from.

    Attributes:
        rows: The row of each image.

    Raises:
        TypeError: if the column holds something else.
    """

    def __init__(self, dataset: Any, name: str, image_root: str | PathLike[str] = ".") -> None:
        import datasets

        self.name, self.image_root, feature = name, image_root, dataset.features[name]
        column = dataset.select_columns(name)
        if isinstance(feature, datasets.Image):
            column = column.cast_column(name, datasets.Image(decode=False))  # nothing is copied: only the type changes
        elif not _is_stored_image(feature):
            raise TypeError(
                f"Expected the column {name!r} to hold one image per row (`datasets.Image()`, bytes or paths), got {feature}. "
                f"Name another column with `image`, or give it the type: `dataset.cast_column({name!r}, datasets.Image())`."
            )
        self.column = column
        self.rows: Any = np.arange(len(column))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: Any) -> Any:
        return self._source(self.column[int(self.rows[number])][self.name])

    def paths(self) -> list[str] | None:
        """Return the path of each row, or None where a row holds an image itself. No image is read.

        Raises:
            ValueError: if a row holds neither.
        """
        chunks = self.column.data.column(self.name).chunks
        # Of the whole table, of which the data set may be a part. Arrow knows it without reading the values.
        if any(_has_missing(chunk) for chunk in chunks):
            for row in range(len(self.column)):
                value = self.column[row][self.name]
                if value is None or (isinstance(value, dict) and value["bytes"] is None and value["path"] is None):
                    raise ValueError(
                        f"Expected row {row} to have an image in the column {self.name!r}, got {value}. Leave such rows out: "
                        "`dataset.filter(...)`."
                    )
        if not all(_are_paths(chunk) for chunk in chunks):
            return None
        values = (value for rows in self.column.iter(batch_size=1000) for value in rows[self.name])
        paths = [value["path"] if isinstance(value, dict) else value for value in values]
        return None if any(_is_remote(path) for path in paths) else paths

    def _source(self, value: Any) -> Any:
        if not isinstance(value, dict):
            value = {"bytes": value, "path": None} if isinstance(value, bytes) else {"bytes": None, "path": value}
        if value["bytes"] is not None:
            return value["bytes"]
        if not _is_remote(value["path"]):
            return Path(self.image_root, value["path"])
        import datasets

        return datasets.Image().decode_example(value)  # within an archive, or at an address


def _is_stored_image(feature: Any) -> bool:
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return getattr(feature, "dtype", "").removeprefix("large_") in ("string", "binary")


def _has_missing(chunk: Any) -> bool:
    if chunk.type.num_fields == 0:
        return bool(chunk.null_count)
    no_bytes, no_path = (chunk.field(name).is_null().to_numpy(zero_copy_only=False) for name in ("bytes", "path"))
    return bool(chunk.null_count) or bool((no_bytes & no_path).any())


def _are_paths(chunk: Any) -> bool:
    if chunk.type.num_fields == 0:
        return "string" in str(chunk.type)
    return bool(chunk.field("bytes").null_count == len(chunk))


def _is_remote(path: str) -> bool:
    return "://" in path or "::" in path
