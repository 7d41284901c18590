"""Write rows about images and texts into files that other programs read."""

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from lightning_itm.checks import check_choice
from lightning_itm.data.inputs.sources import LazyImages
from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.data.shards.tar import TarMember
from lightning_itm.mining.search import MinedNegatives

ROWS_AT_ONCE = 10_000


def check_no_results(folder: Path, names: Sequence[str]) -> None:
    """Raise a FileExistsError if a folder holds one of the files already."""
    there = [name for name in names if (folder / name).exists()]
    if there:
        raise FileExistsError(
            f"Expected a folder without results, got {folder} with {', '.join(there)}. Name another one."
        )


@contextmanager
def whole_files(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Give a folder to write files into, and rename them to their place when all are complete.

    So what breaks off, by an error or for want of room, leaves no half file that would pass for a result.

    Args:
        folder: Where the files belong.
        names: The names of the files.
    """
    with TemporaryDirectory(prefix=".part-", dir=folder) as part:  # on the same disk, where a rename copies nothing
        yield Path(part)
        for name in names:
            os.replace(Path(part, name), folder / name)


def describe_image(pairs: ImageTextDataset, image_id: int) -> dict[str, Any]:
    """Return the id and the name of an image. One in memory has no name."""
    if isinstance(pairs.images, LazyImages):
        return {"image_id": image_id, "image": None}  # not decoded only to find that it has no name
    source = pairs.images[image_id]
    if isinstance(source, TarMember):
        return {"image_id": image_id, "image": f"{source.path}/{source.key}"}
    return {"image_id": image_id, "image": fspath(source) if isinstance(source, str | PathLike) else None}


def describe_text(pairs: ImageTextDataset, text_id: int) -> dict[str, Any]:
    """Return the id of a text, that of its image, and the text."""
    return {"text_id": text_id, "image_id": int(pairs.text_image_id[text_id]), "text": pairs.texts[text_id]}


def write_jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    # Half a surrogate pair, which texts from the web have, is no UTF-8. Its escape is that of JSON: readers get it back.
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Write a Parquet file, a few thousand rows at once, so that they need not all be in memory.

    It holds UTF-8 alone. So half a surrogate pair, which texts from the web have, becomes ``?``.

    Args:
        path: The file that is written.
        rows: At least one row. Its keys are the columns.

    Raises:
        ModuleNotFoundError: if pyarrow is not installed.
    """
    pa = pyarrow()
    first = next(rows)
    schema = pa.schema([(name, _type(pa, name)) for name in first])
    rows = itertools.chain([first], rows)
    with pa.parquet.ParquetWriter(path, schema) as writer:
        while some := list(itertools.islice(rows, ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(_in_utf8(some), schema=schema))


def pyarrow() -> Any:
    """Return the module ``pyarrow``.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Expected pyarrow, to write Parquet, found none: `pip install \"lightning_itm[parquet]\"`, or use 'jsonl'."
        ) from error
    return pyarrow


def _in_utf8(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {name: _in_utf8(part) for name, part in value.items()}
    return [_in_utf8(part) for part in value] if isinstance(value, list) else value


def _type(pa: Any, name: str) -> Any:
    # Given, and not inferred: a first row without negatives, or without an image's name, would make columns of nulls.
    image = [("image_id", pa.int64()), ("image", pa.string())]
    text = [("text_id", pa.int64()), ("image_id", pa.int64()), ("text", pa.string())]
    score = [("score", pa.float32())]
    lists = {"images": pa.list_(pa.struct(image + score)), "texts": pa.list_(pa.struct(text + score))}
    return {**dict(image + text), **lists}[name]


def negative_files(format: str) -> tuple[str, str]:
    """Return the names of the two files of mined negatives. ``format`` is their ending.

    Raises:
        ValueError: if there is no such format.
        ModuleNotFoundError: if pyarrow is needed and not installed.
    """
    check_choice("format", format, ("jsonl", "parquet"))
    if format == "parquet":
        pyarrow()  # before anything is encoded
    return f"texts_of_images.{format}", f"images_of_texts.{format}"


def write_negatives(folder: Path, pairs: ImageTextDataset, mined: MinedNegatives, format: str) -> None:
    """Write what was mined for a set: one row per image, and one per text, the hardest first.

    Args:
        folder: Where the files are written. It must exist.
        pairs: The set that was mined.
        mined: What was mined for it.
        format: ``"jsonl"`` or ``"parquet"``.
    """
    put, names = write_jsonl if format == "jsonl" else write_parquet, negative_files(format)
    with whole_files(folder, names) as part:
        put(part / names[0], _rows_of(pairs, "image", "text", mined.texts, mined.text_scores))
        put(part / names[1], _rows_of(pairs, "text", "image", mined.images, mined.image_scores))


DESCRIBE = {"image": describe_image, "text": describe_text}


def _rows_of(
    pairs: ImageTextDataset, anchor: str, negative: str, index: Tensor, scores: Tensor
) -> Iterator[dict[str, Any]]:
    # One by one: all rows at once, 300 dicts in each, would take many times the memory of the two tensors.
    for anchor_id, (ids, values) in enumerate(zip(index.cpu(), scores.float().cpu(), strict=True)):
        hardest = [
            {**DESCRIBE[negative](pairs, negative_id), "score": round(score, 6)}
            for negative_id, score in zip(ids.tolist(), values.tolist(), strict=True)
            if negative_id >= 0
        ]
        yield {**DESCRIBE[anchor](pairs, anchor_id), f"{negative}s": hardest}
