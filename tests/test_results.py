"""The figures of the pages are those that their commands print from the rows that are kept."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = re.compile(r"python (benchmarks/negatives\.py --setting .*--table.*)$", re.MULTILINE)
FIGURE = re.compile(r"[+-]?\d+\.\d+(?: ± \d+\.\d+)?(?: x)?|(?<=\| )\d(?= \|)")
SEEDS = re.compile(r"(?<=\s)\d(?=\s)")
NAMES = 26  # characters: numbers in the names of methods are no seeds
GAIN = re.compile(r"[+-]\d+\.\d+ ± \d+\.\d+")
TABLES = re.compile(r"^\|.*$", re.MULTILINE)
CELL = re.compile(r"(?P<bold>\*\*)?\+(?P<gain>\d+\.\d) ± (?P<half>\d+\.\d)(?:\*\*)?")
BLOCK = re.compile(r"((?:^\|.*\n)+)|```bash\n((?:.*\n)*?)```", re.MULTILINE)


def plain(text):
    """Write signs as a terminal does."""
    return text.replace("−", "-").replace("×", "x").replace("**", "").replace("| 1 x |", "| 1.00 x |")


@pytest.fixture
def printed(monkeypatch, capsys):
    """Return what prints the table of a command, and returns the figures of each of its lines."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import negatives_table

    def run(command):
        words = shlex.split(command)
        path = ROOT / (words[words.index("--results") + 1] if "--results" in words else "benchmarks/negatives.jsonl")
        setting = words[words.index("--setting") + 1]
        negatives_table.print_table(negatives_table.read(path, setting=setting, is_tuning=False, device="cpu"))
        text = re.sub(r"(?<=±) +", " ", capsys.readouterr().out)
        lines = [
            SEEDS.findall(line[NAMES:]) + FIGURE.findall(line[NAMES:]) for line in text.splitlines() if " x" in line
        ]
        assert lines, text
        return lines

    return run


def is_of(row, line):
    """Tell whether the figures of a row stand in a printed line, in its order, the last one at its end."""
    rest = iter(line)
    return (
        all(any(figure in (other, other.split(" ± ")[0]) for other in rest) for figure in row) and row[-1] == line[-1]
    )


def tables_of_results():
    """Return each table of the page with the first command after it that prints its rows."""
    rows, found = [], []
    for table, commands in BLOCK.findall((ROOT / "docs" / "results.md").read_text()):
        if table:
            rows = [FIGURE.findall(plain(line)) for line in table.splitlines()[2:]]
        elif rows and (match := [one for one in TABLE.findall(commands) if "--tune" not in one]):
            found.append(pytest.param(match[0], rows, id=shlex.split(match[0])[2]))
            rows = []
    return found


def test_all_settings_have_a_table():
    settings = {case.id for case in tables_of_results()}
    emoji, icons, heads = {"emoji-32", "emoji-128", "emoji-towers"}, {"icons", "icons-512"}, {"heads-16", "heads-128"}
    assert settings == emoji | icons | heads | {"flickr8k", "grid-converged"}


@pytest.mark.parametrize(("command", "rows"), tables_of_results())
def test_each_row_of_the_results_is_a_row_of_its_command(command, rows, printed):
    lines = printed(command)
    for row in rows:
        assert any(is_of(row, line) for line in lines), f"{row} is in no line of {command}"


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_bold_gains_are_those_whose_interval_lies_above_0(page):
    cells = [cell.strip() for line in TABLES.findall((ROOT / page).read_text()) for cell in line.split("|")]
    gains = [match for cell in cells if (match := CELL.fullmatch(cell))]
    assert len(gains) > 10
    for match in gains:
        is_above = float(match["gain"]) > float(match["half"])
        assert bool(match["bold"]) == is_above, match.string


@pytest.mark.parametrize("page", ["README.md", "docs/choose.md"])
def test_each_gain_that_a_page_names_is_one_of_its_tables(page, printed):
    text = (ROOT / page).read_text()
    known = {figure for command in TABLE.findall(text) for line in printed(command) for figure in line}
    gains = GAIN.findall(plain(text))
    assert gains
    assert set(gains) <= known
