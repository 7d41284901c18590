"""Read tables with one pair per row: CSV, TSV and the like, and JSON Lines."""

import csv
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import TextIO

from lightning_itm.data.image import IMAGE_ENDINGS
from lightning_itm.data.readers.captions import CaptionsOfImages, WithHardCaptions, shorten
from lightning_itm.data.readers.hard_captions import check_name, hard_captions_of_cell, hard_captions_of_row
from lightning_itm.data.readers.text_files import load_json, open_text

DELIMITERS = (",", "\t", "|", ";")


def read_table(
    path: str | PathLike[str],
    image_root: str | PathLike[str],
    image_column: str,
    text_column: str,
    delimiter: str | None = None,
    encoding: str | None = None,
    hard_captions: str | None = None,
) -> WithHardCaptions:
    """Read a table with a header, one pair per row. Rows with the same image share it.

    Returns:
        The images, the captions of each, and the hard captions of each caption, or None without ``hard_captions``.

    Raises:
        ValueError: if a column is missing or comes twice, if a row has another number of cells than the header, if a quote is
            not closed, or if no row has a caption.
        FileNotFoundError: if the first image does not exist.
    """
    delimiter, header = _find_header(path, image_column.strip(), text_column.strip(), delimiter, encoding)
    image_index, text_index = header.index(image_column.strip()), header.index(text_column.strip())
    hard_index = _find_hard_captions(path, hard_captions, header)
    found = CaptionsOfImages(path, image_root)
    with open_text(path, encoding, newline="") as file:
        rows = _rows(file, path, delimiter)
        next(rows)  # the header
        for line, row in rows:
            if len(row) != len(header):
                raise ValueError(
                    f"Expected line {line} of {path} to have {len(header)} cells, as the header {header} has, got "
                    f"{len(row)}: {shorten(row)}. Put double quotes around a cell that has {delimiter!r} in it, or name "
                    "another `delimiter`."
                )
            _check_whole(row, line, path, delimiter, len(header), image_index)
            num_captions = found.add(row[image_index], row[text_index], f"line {line}")
            if hard_index is not None:
                wrong = hard_captions_of_cell(row[hard_index], f"line {line} of {path}")
                found.add_hard_captions(row[image_index], num_captions, wrong)
    images, texts = found.finish()
    return images, texts, None if hard_index is None else found.hard_captions_of(images)


def read_jsonl(
    path: str | PathLike[str],
    image_root: str | PathLike[str],
    image_column: str,
    text_column: str,
    encoding: str | None = None,
    hard_captions: str | None = None,
) -> WithHardCaptions:
    """Read one JSON object per line, whose text is a string or a list of strings.

    Returns:
        As :func:`read_table`. Each caption of a line has all hard captions of the line.

    Raises:
        ValueError: if a line is no JSON object with both keys, or if none has a caption.
        FileNotFoundError: if the first image does not exist.
    """
    check_name(hard_captions)
    found = CaptionsOfImages(path, image_root)
    with open_text(path, encoding) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"line {number}"
                row = load_json(line.strip(), f"{where} of {path}")
                num_captions = found.add_row(row, image_column, text_column, where)
                if hard_captions is not None:
                    wrong = hard_captions_of_row(row, hard_captions, f"{where} of {path}")
                    found.add_hard_captions(row[image_column], num_captions, wrong)
    images, texts = found.finish()
    return images, texts, None if hard_captions is None else found.hard_captions_of(images)


def _find_header(
    path: str | PathLike[str], image_column: str, text_column: str, delimiter: str | None, encoding: str | None
) -> tuple[str, list[str]]:
    """Return the delimiter under which the header has both columns, and the header."""
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise ValueError(
            f"Expected `delimiter` to be one sign, such as ';', got {delimiter!r}. Most shells write a tab as $'\\t'."
        )
    best: list[str] = []
    for sign in DELIMITERS if delimiter is None else (delimiter,):
        with open_text(path, encoding, newline="") as file:
            try:
                header = [name.strip() for name in next(_rows(file, path, sign), (1, []))[1]]
            except UnicodeError:
                raise  # which `open_text` explains
            except ValueError:  # no header with this sign, and perhaps with another
                continue
        if header.count(image_column) == header.count(text_column) == 1:
            return sign, header
        best = max(best, header, key=len)
    raise ValueError(
        f"Expected the header of {path} to have {image_column!r} and {text_column!r}, each once, got the columns {best}. Name "
        "yours with `image_column` and `text_column`, and the sign between them with `delimiter`."
    )


def _find_hard_captions(path: str | PathLike[str], column: str | None, header: list[str]) -> int | None:
    check_name(column)
    if column is None:
        return None
    if header.count(column.strip()) != 1:
        raise ValueError(
            f"Expected the header of {path} to have the hard captions {column!r} once, got the columns {header}. Name yours "
            "with `hard_captions`, or leave it out."
        )
    return header.index(column.strip())


def _rows(file: TextIO, path: str | PathLike[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each row that is not blank, with the number of its first line."""
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    line = 1
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"Expected a table in {path}, got in line {line}: {error}. A cell that begins with a double quote must end "
                "with one, and those within it must be doubled."
            ) from error
        if row:
            yield line, row
        line = reader.line_num + 1


def _check_whole(
    row: list[str], line: int, path: str | PathLike[str], delimiter: str, num_cells: int, image_index: int
) -> None:
    """Raise if a cell holds whole rows. That is what an unclosed quote makes of the rows up to the next quote."""
    for cell in row:
        for inner in cell.splitlines() if "\n" in cell or "\r" in cell else ():
            cells = inner.split(delimiter)
            if len(cells) >= num_cells and Path(cells[image_index].strip(' "')).suffix.lower()[1:] in IMAGE_ENDINGS:
                raise ValueError(
                    f"Expected one row from line {line} of {path} on, got a cell that holds another: {shorten(inner)}. Close "
                    "the double quote in that line, or remove it."
                )
