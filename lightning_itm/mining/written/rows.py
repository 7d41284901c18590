"""Read the files of :class:`~lightning_itm.NegativeWriter` back, and check that they are of a set."""

import json
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_itm.captions import captions_of_images
from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.data.readers.captions import shorten
from lightning_itm.identity import relative_names

FILES = ("texts_of_images", "images_of_texts")
ROWS_AT_ONCE = 10_000
WAY_OUT = "Mine this training set again: `lightning-itm mine`."


class _Row(NamedTuple):
    number: int
    image_id: int
    name: str | None
    """The name of the image, or the text."""
    ids: Sequence[int]
    """The negatives, the hardest first."""


def find_files(folder: str | PathLike[str]) -> list[Path]:
    """Return the two files of a folder, as JSON Lines or Parquet.

    Raises:
        FileNotFoundError: if they are not there.
    """
    for ending in ("jsonl", "parquet"):
        files = [Path(folder, f"{name}.{ending}") for name in FILES]
        if all(file.is_file() for file in files):
            return files
    raise FileNotFoundError(
        f"Expected {FILES[0]}.jsonl and {FILES[1]}.jsonl, or both as .parquet, in `table`, the folder {folder}, found neither "
        "pair. Write them with `lightning-itm mine`."
    )


def read_negatives(
    folder: str | PathLike[str], pairs: ImageTextDataset, texts_per_image: int, images_per_text: int
) -> tuple[Tensor, Tensor]:
    """Read what was mined for a set. Rows are read one after the other, so it takes no more memory than the result.

    Args:
        folder: What ``lightning-itm mine`` or :class:`~lightning_itm.NegativeWriter` wrote.
        pairs: The set that was mined.
        texts_per_image: Number of texts that are kept per image. There may be more in the files: the hardest are kept.
        images_per_text: Number of images that are kept per text, likewise.

    Returns:
        int32 `(images, texts_per_image)` and int32 `(texts, images_per_text)`, ids of the negatives, −1 where there is none.

    Raises:
        ValueError: if the files are of another set, have fewer negatives per row, or are no such files.
        FileNotFoundError: if they are not there.
    """
    of_images, of_texts = find_files(folder)
    num_images, num_texts = len(pairs.images), len(pairs.texts)
    owner = pairs.text_image_id
    fewest = int(torch.bincount(owner).min())  # texts of an image, which are none of its negatives
    images = _fill(of_texts, _checked_texts(of_texts, pairs), (num_texts, images_per_text), num_images, 1)
    texts = _fill(of_images, _checked_images(of_images, pairs), (num_images, texts_per_image), num_texts, fewest)
    _check_own(of_texts, "image", images, lambda rows, ids: ids == owner[rows, None])
    _check_own(of_images, "text", texts, lambda rows, ids: owner[ids] == rows[:, None])
    if pairs.caption_id is not None:
        own = captions_of_images(pairs.caption_id, owner, num_images)[:, None]  # (images, 1, most)
        caption_id = pairs.caption_id[:, None]
        _check_own(of_images, "text", texts, lambda rows, ids: (caption_id[ids] == own[rows]).any(dim=2))
    return texts, images


def _fill(path: Path, rows: Iterator[_Row], shape: tuple[int, int], num_ids: int, num_own: int) -> Tensor:
    """Return the rows as a table of a shape, of ids below ``num_ids``, of which at least ``num_own`` are no negatives."""
    table, k = np.full(shape, -1, dtype=np.int32), shape[1]
    longest = 0
    for row in rows:
        table[row.number, : len(row.ids)] = row.ids[:k]
        longest = max(longest, len(row.ids))
    if longest < min(k, num_ids - num_own):
        name = f"{path.stem.split('_')[0]}_per_{path.stem.split('_')[2][:-1]}"
        raise ValueError(
            f"Expected {k} negatives per row of {path}, as `{name}` says, got at most {longest}. "
            + (f"Give `{name}={longest}`, or mine more." if longest else "Nothing was mined: loosen the guards there.")
        )
    if table.max(initial=-1) >= num_ids:
        raise ValueError(f"Expected ids below {num_ids} in {path}, got {table.max()}. {WAY_OUT}")
    return torch.from_numpy(table)


def _checked_texts(path: Path, pairs: ImageTextDataset) -> Iterator[_Row]:
    """Yield the rows of texts. Raise at the first that is not of the set."""
    rows = _numbered(path, _rows(path, "text", "image"), len(pairs.texts), "texts")
    for row, text, owner in zip(rows, pairs.texts, pairs.text_image_id.tolist(), strict=False):
        if _utf8(row.name) != _utf8(text) or row.image_id != owner:
            raise ValueError(
                f"Expected the negatives in {path} to be of this training set, got text {row.number} of image {row.image_id}: "
                f"{shorten(row.name)}. Here it is of image {owner}: {shorten(text)}. {WAY_OUT}"
            )
        yield row


def _checked_images(path: Path, pairs: ImageTextDataset) -> Iterator[_Row]:
    """Yield the rows of images. Raise if the names of the images, from their common folder on, are not those of the set."""
    names: list[str] = []
    for row in _numbered(path, _rows(path, "image", "text"), len(pairs.images), "images"):
        names += [] if row.name is None else [row.name]
        yield row
    is_named = isinstance(pairs.images, list) and all(isinstance(image, str | PathLike) for image in pairs.images)
    if not is_named or len(names) < len(pairs.images):  # in memory, or in shards
        return
    for number, (name, own) in enumerate(zip(relative_names(names), relative_names(pairs.images), strict=True)):
        if name != own:
            raise ValueError(
                f"Expected the negatives in {path} to be of this training set, got {name} as image {number}, which is {own} "
                f"here. {WAY_OUT}"
            )


def _numbered(path: Path, rows: Iterator[_Row], num_rows: int, what: str) -> Iterator[_Row]:
    """Yield rows that are numbered from 0. Raise if one is not, or if there are more or fewer."""
    count = 0
    for count, row in enumerate(rows, 1):
        if row.number != count - 1:
            raise ValueError(f"Expected row {count} of {path} to have the id {count - 1}, got {row.number}. {WAY_OUT}")
        if count <= num_rows:
            yield row
    if count != num_rows:
        raise ValueError(
            f"Expected rows of {num_rows} {what}, those of this training set, got {count} in {path}. {WAY_OUT}"
        )


def _rows(path: Path, anchor: str, negative: str) -> Iterator[_Row]:
    names = f"{anchor}_id", "image_id", anchor, f"{negative}s", f"{negative}_id"
    return _rows_of_parquet(path, *names) if path.suffix == ".parquet" else _rows_of_lines(path, *names)


def _rows_of_lines(path: Path, number: str, image_id: str, name: str, negatives: str, negative: str) -> Iterator[_Row]:
    with open(path, encoding="utf-8") as file:
        for line_number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                found = _Row(row[number], row[image_id], row[name], [entry[negative] for entry in row[negatives]])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"Expected line {line_number} of {path} to be a row that `lightning-itm mine` wrote, got {shorten(line)}."
                ) from error
            yield found


def _rows_of_parquet(
    path: Path, number: str, image_id: str, name: str, negatives: str, negative: str
) -> Iterator[_Row]:
    from pyarrow.parquet import ParquetFile  # whoever wrote it has it

    with ParquetFile(path, memory_map=True) as file:
        for batch in file.iter_batches(batch_size=1000, columns=[number, image_id, name, negatives]):
            lists = batch.column(negatives)
            ids = lists.flatten().field(negative).to_numpy()
            ends = np.cumsum(lists.value_lengths().to_numpy())
            columns = (batch.column(column).to_pylist() for column in (number, image_id, name))
            for *anchor, part in zip(*columns, np.split(ids, ends[:-1]), strict=True):
                yield _Row(anchor[0], anchor[1], anchor[2], part)


def _utf8(text: Any) -> Any:
    # Parquet holds no halves of surrogate pairs: the writer puts "?" there.
    return text.encode("utf-8", "replace") if isinstance(text, str) else text


def _check_own(path: Path, negative: str, table: Tensor, is_own: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Raise if a negative is a match of its row. ``is_own`` gets row numbers `(rows,)` and ids `(rows, k)`."""
    for rows in torch.arange(len(table)).split(ROWS_AT_ONCE):
        wrong = (is_own(rows, table[rows].clamp_min(0).long()) & (table[rows] >= 0)).nonzero()
        if len(wrong):
            row, column = int(rows[wrong[0, 0]]), int(wrong[0, 1])
            raise ValueError(
                f"Expected negatives in row {row + 1} of {path}, got {negative} {int(table[row, column])}, which matches: it "
                f"is the row's own, or has an equal caption (`equal_captions`). {WAY_OUT}"
            )
