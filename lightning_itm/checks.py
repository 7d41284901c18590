"""Check arguments, in one way in every room."""

from collections.abc import Mapping, Sequence
from typing import Any


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Check that an argument is one of several strings.

    Args:
        name: The name of the argument, as it stands in the error.
        value: The value that was given.
        choices: The values that are allowed.

    Raises:
        ValueError: if the value is none of the choices, which the error lists.

    Example:
        >>> from lightning_itm.checks import check_choice
        >>> check_choice("reduction", "max", ("mean", "sum"))
        Traceback (most recent call last):
        ValueError: Expected `reduction` to be one of 'mean', 'sum', got 'max'.
    """
    if value not in choices:
        raise ValueError(f"Expected `{name}` to be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_at_least(least: int, **counts: int | None) -> None:
    """Raise a ValueError that names the first count below ``least``. ``None`` passes."""
    for name, value in counts.items():
        if value is not None and value < least:
            raise ValueError(f"Expected `{name}` to be at least {least}, got {value}.")


def check_tokens(tokens: Any) -> Any:
    """Return what a tokenizer made of one text, without the dimension of the texts.

    Args:
        tokens: What the tokenizer returned for a list of one text: a tensor or array `(1, length)`, a mapping of these such as
            the ``BatchEncoding`` of ``transformers``, or a list of one string.

    Returns:
        The row of the text, such as a tensor `(length,)`. Of a mapping, a dict of rows.

    Raises:
        TypeError: if it is something else. Lists of ids would be cut into columns where a batch is stacked, silently.
        ValueError: if a value of a mapping has not exactly one row.

    Example:
        >>> from lightning_itm.checks import check_tokens
        >>> check_tokens([[101, 7, 102]])
        Traceback (most recent call last):
        TypeError: Expected `tokenizer` to return a tensor (1, length) for a list of one text, or a dict of these, got ...
    """
    if isinstance(tokens, Mapping) and tokens and all(len(getattr(value, "shape", ())) for value in tokens.values()):
        if odd := {key: tuple(value.shape) for key, value in tokens.items() if len(value) != 1}:
            raise ValueError(f"Expected `tokenizer` to return one row for a list of one text, got the shapes {odd}.")
        return {key: value[0] for key, value in tokens.items()}
    row = tokens[0] if (isinstance(tokens, Sequence) and tokens) or len(getattr(tokens, "shape", ())) else None
    # What can be stacked into a batch: strings, dicts of tensors, and whatever has a shape.
    if isinstance(row, str | Mapping) or hasattr(row, "shape"):
        return row
    inner = next(iter(tokens.values()), None) if isinstance(tokens, Mapping) else row
    got = type(tokens).__name__ + (f" of {type(inner).__name__}" if inner is not None else "")
    raise TypeError(
        f"Expected `tokenizer` to return a tensor (1, length) for a list of one text, or a dict of these, got {got}. For one "
        'of transformers, give `lambda texts: tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")`.'
    )
