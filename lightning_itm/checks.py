"""Check arguments, in one way in every room."""


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
