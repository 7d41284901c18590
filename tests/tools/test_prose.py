"""Each count is found in a small wrong sample, and none in a right one."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RIGHT = '''"""Weigh rows."""


def weigh(rows, factor):
    """Multiply each row.

    Args:
        rows: Unit-norm embeddings, one per image.
        factor: The number that multiplies, typically 2. Raise it
            where weights are small.

    Example:
        >>> from weights import weigh
        >>> weigh([1], factor=2)
        [2]
    """
    # Rows come first, so that a caller can pass a list of them.
    return [factor * row for row in rows]
'''
# What to replace in the right sample, by what, and the count that finds it.
WRONG = [
    ("Multiply each row.", "Multiply each row; keep the rest.", "semicolons per 1,000 words of docstrings"),
    ("one per image", "one embedding an image", "'a' for 'per'"),
    ("one per image", "two texts\n            an image", "'a' for 'per'"),
    ("The number that multiplies, typically 2.", "Of the rows above here.", "argument docs that begin as a fragment"),
    ("The number that multiplies", "See the function above", "argument docs that begin as a fragment"),
    ("        >>> from weights import weigh\n", "", "examples that import nothing"),
    (
        "Unit-norm embeddings, one per image.",
        "Unit-norm embeddings.",
        "percent of argument docs of three words or fewer",
    ),
    ("    # Rows come first, so that a caller can pass a list of them.\n", "", "comments per 100 lines of code"),
    ("# Rows come first, so that a caller can pass a list of them.", "# noqa", "comments per 100 lines of code"),
]


@pytest.fixture(scope="module")
def prose():
    spec = importlib.util.spec_from_file_location("prose", ROOT / "tools" / "prose.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def missed(prose, capsys, source):
    """The names of the counts that fail."""
    Path("sample.py").write_text(source)
    status = prose.main(["--list", "sample.py"])
    lines = capsys.readouterr().out.splitlines()
    names = [line.removeprefix("FAIL ").rpartition(": ")[0].rpartition(": ")[0] for line in lines if line[:4] == "FAIL"]
    assert status == bool(names)
    return names


def test_a_right_sample_meets_every_aim(prose, capsys):
    assert missed(prose, capsys, RIGHT) == []


@pytest.mark.parametrize(("right", "wrong", "count"), WRONG)
def test_each_count_finds_what_is_wrong(prose, capsys, right, wrong, count):
    assert right in RIGHT
    assert missed(prose, capsys, RIGHT.replace(right, wrong)) == [count]


def test_places_are_named(prose, capsys):
    Path("sample.py").write_text(RIGHT.replace("one per image", "one embedding an image"))
    prose.main(["--list", "sample.py"])
    assert "sample.py:4: 'a' for 'per': embedding an image" in capsys.readouterr().out


def test_an_argument_goes_on_over_lines(prose):
    docs = dict(
        prose.argument_docs("Do.\n\nArgs:\n    a: One two\n        three four.\n    *b: Five.\n\nReturns:\n    c: no.")
    )
    assert docs == {"a": "One two three four.", "*b": "Five."}
