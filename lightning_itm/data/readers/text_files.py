"""Open text files in the encoding that they are in, and JSON without guesses."""

import io
import json
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE, lookup
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, TextIO


@contextmanager
def open_text(path: str | PathLike[str], encoding: str | None = None, newline: str | None = None) -> Iterator[TextIO]:
    """Open a text file for reading.

    Args:
        path: The path of the file.
        encoding: The encoding of the file, such as ``"cp1252"``. Default: UTF-8, or UTF-16 if the file begins with its
            byte-order mark.
        newline: What Python's ``open`` takes under this name. By default, each kind of line end becomes a line feed.

    Raises:
        ValueError: if the file is in another encoding, or if Python does not know that encoding.
    """
    with open(path, "rb") as file:
        chosen = text_encoding(file.read(2), encoding)
    try:
        with open(path, encoding=chosen, newline=newline) as text:
            yield text
    except UnicodeError as error:
        raise _other_encoding(path, encoding, chosen, error) from error


def read_text(path: str | PathLike[str], encoding: str | None = None) -> str:
    """Read a text file in whole. Arguments and errors are those of :func:`open_text`."""
    data = Path(path).read_bytes()
    chosen = text_encoding(data[:2], encoding)
    try:
        return decode_text(data, chosen)
    except UnicodeError as error:
        raise _other_encoding(path, encoding, chosen, error) from error


def decode_text(data: bytes, encoding: str | None = None) -> str:
    """Decode the bytes of a text file. Each kind of line end becomes a line feed.

    Raises:
        UnicodeError: if they are in another encoding. By default, it is told by the first two, as in :func:`open_text`.
    """
    return io.TextIOWrapper(io.BytesIO(data), encoding=encoding or text_encoding(data[:2])).read()


def text_encoding(start: bytes, encoding: str | None = None) -> str:
    """Return the encoding by which a text file is opened.

    Args:
        start: The first two bytes of the file.
        encoding: The one that the user names, if any.

    Raises:
        ValueError: if Python knows no such encoding of texts.
    """
    if encoding is not None:
        try:
            "".encode(encoding)
        except (LookupError, ValueError) as error:
            raise ValueError(
                f"Expected `encoding` to be one that Python knows, such as 'cp1252', got {encoding!r}."
            ) from error
    if encoding is None and start in (BOM_UTF16_LE, BOM_UTF16_BE):
        return "utf-16"
    # "utf-8-sig" leaves out the byte-order mark that Windows puts first.
    return "utf-8-sig" if encoding is None or lookup(encoding).name == "utf-8" else encoding


def load_json(content: str | bytes, where: str) -> Any:
    """Parse JSON.

    Args:
        content: The JSON, as text or in UTF-8.
        where: What is parsed, for the message of the error. Such as ``"line 3 of a.jsonl"``.

    Raises:
        ValueError: if it is no JSON, if it is too deep to be read, or if an object has a key twice.
    """
    try:
        return json.loads(content, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected {where} to be JSON, got: {error}. Repair it, or leave it out.") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # Python would keep the last, silently
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} twice in one object")
    return found


def _other_encoding(path: str | PathLike[str], encoding: str | None, chosen: str, error: UnicodeError) -> ValueError:
    got: object = error
    data = Path(path).read_bytes()  # in whole: the error of a stream knows only its place in a part of the file
    try:
        data.decode(chosen)
    except UnicodeDecodeError as found:
        line = 1 + len(re.findall(rb"\r\n|\r|\n", data[: found.start]))
        got = f"the byte 0x{data[found.start]:02x} in line {line}, at byte {found.start} of the file"
    except UnicodeError:
        pass
    way_out = "Name the one that it is in." if encoding else 'A file from Windows often needs `encoding="cp1252"`.'
    return ValueError(f"Expected {path} to be in the encoding {chosen.removesuffix('-sig')}, got {got}. {way_out}")
