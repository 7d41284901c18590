"""Captions of a file that are wrong for the image of their row: what a cell or a value may hold."""

from typing import Any

from lightning_itm.data.readers.captions import shorten, split_captions
from lightning_itm.data.readers.text_files import load_json


def hard_captions_of(value: Any, where: str) -> list[str]:
    """Return the wrong captions in a value of a JSON file.

    Args:
        value: A list of strings, or one string. ``None``, an empty string and an empty list are no caption.
        where: The place, for messages. Such as ``"line 3 of a.jsonl"``.

    Raises:
        ValueError: if it is something else, or if a string can't be stored as UTF-8.

    Example:
        >>> from lightning_itm.data.readers.hard_captions import hard_captions_of
        >>> hard_captions_of(["a cat", "a cow"], "line 1"), hard_captions_of("a cat", "line 2"), hard_captions_of(None, "")
        (['a cat', 'a cow'], ['a cat'], [])
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    entries = value if isinstance(value, list) else [value]
    # Blank ones within a list pass: the set leaves them out and counts them in its warning.
    others = [entry for entry in split_captions(entries)[1] if not isinstance(entry, str) or entry.strip()]
    if entries and others:
        raise ValueError(
            f"Expected the hard captions in {where} to be a text or a list of texts, got {shorten(others[0])}. Put an empty "
            "list where there is none."
        )
    return entries


def hard_captions_of_cell(cell: str, where: str) -> list[str]:
    """Return the wrong captions in a cell of a table: a JSON list of strings, or one plain string.

    Args:
        cell: The cell. If it begins with ``[``, it is JSON. A blank one has no caption.
        where: The place, for messages. Such as ``"line 3 of a.csv"``.

    Raises:
        ValueError: if it begins as a list and is no JSON, or if an entry of the list is no text.

    Example:
        >>> from lightning_itm.data.readers.hard_captions import hard_captions_of_cell
        >>> hard_captions_of_cell('["a cat", "a cow"]', "line 1"), hard_captions_of_cell("a cat", "line 2")
        (['a cat', 'a cow'], ['a cat'])
    """
    if not cell.strip().startswith("["):
        return hard_captions_of(cell, where)
    try:
        value = load_json(cell.strip(), "it")
    except ValueError as error:
        # Such as a list that Python printed, with single quotes.
        raise ValueError(
            f"Expected the hard captions in {where}, which begin with '[', to be a JSON list of texts, such as "
            f'["a cat", "a cow"], got {shorten(cell)} ({error.__cause__}). `json.dumps` writes one, also of a single text.'
        ) from error
    return hard_captions_of(value, where)


def hard_captions_of_row(row: dict[str, Any], column: str, where: str) -> list[str]:
    """Return the wrong captions in an object of a JSON file.

    Raises:
        ValueError: if the object lacks the key, or if its value is no text and no list of texts.
    """
    if column not in row:
        raise ValueError(
            f"Expected {where} to have the hard captions {column!r}, got the columns {list(row)}. Name yours with "
            "`hard_captions`, and put an empty list where there is none."
        )
    return hard_captions_of(row[column], where)


def check_name(hard_captions: str | None) -> None:
    """Raise if it is no name.

    Raises:
        TypeError: if it is neither a string nor None, such as a list of captions.
    """
    if not isinstance(hard_captions, str | None):
        raise TypeError(
            f"Expected `hard_captions` to be the name of a column, such as 'hard_captions', got {shorten(hard_captions)}. "
            "Captions themselves go to the constructor of ImageTextDataset."
        )
