"""The page about very large sets, and the script that its numbers come from."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "scale.py"
PAGE = ROOT / "docs" / "scale.md"
NUMBER = re.compile(r"\d(?:[\d,.]*\d)?")
CODE = re.compile(r"```bash\n(.*?)```", re.DOTALL)
ADVICE = "| pairs | what we would do |"


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def rows(text):
    """Return the rows of all tables, in order, without what is no number in the table of advice."""
    tables = [block for block in text.split("\n\n") if block.startswith("| ") and not block.startswith(ADVICE)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for block in tables for line in block.splitlines()]


def test_the_tables_of_the_page_are_those_of_the_script():
    printed = rows(run().stdout)
    assert len(printed) >= 25
    assert rows(PAGE.read_text()) == printed


def test_all_numbers_of_the_page_are_printed():
    printed = set(NUMBER.findall(run().stdout))
    assert len(printed) >= 40
    shown = NUMBER.findall(CODE.sub("", PAGE.read_text()))
    assert not [number for number in shown if number not in printed]


@pytest.mark.slow
def test_the_formulas_agree_with_what_is_measured():
    done = run("--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "All formulas agree with what was measured."


def test_other_plans_give_other_numbers():
    printed = run("--pairs", "1000", "--gpus", "2", "--dim", "8", "--places", "3", "2").stdout
    cells = {row[0]: row[2] for row in rows(printed) if len(row) == 3}
    assert cells["embeddings of both sides, half precision"] == "32,000 B"  # 2 sides · 1,000 rows · 8 places · 2 bytes
    assert cells["exact search, both directions"] == "3.20 · 10⁷"  # 2 directions · 1,000 · 1,000 · 8 · 2 operations
    assert cells["table of 3 + 2 places, on each machine"] == "20,000 B"  # 1,000 pairs · 5 places · 4 bytes
    assert cells["received per GPU while keys go round, both directions"] == "16,000 B"  # half of them are there
