"""The main job, with few epochs: its table, its pictures, and the way to the other example."""

import csv
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import train_on_emoji

    return train_on_emoji


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_table_and_pictures(example, monkeypatch, tmp_path, capsys):
    options = ["--quick", "--start-epochs", "1", "--epochs", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train_on_emoji.py", *options])
    example.main()
    printed = capsys.readouterr().out
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == list(example.QUICK)
    for row in rows:
        assert 0 < float(row["rsum"]) < 600
        assert f"{float(row['rsum']):.1f}" in printed
    for name in ("curves.png", "mined.png", "memory.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_gain_is_paired(example):
    base, row = example.Row(rsum=[500.0, 520.0, 510.0]), example.Row(rsum=[504.0, 526.0, 512.0])
    mean, half = example.gain(row, base)
    assert mean == pytest.approx(4)
    assert half == pytest.approx(4.30 * 2 / 3**0.5)
    assert example.gain(example.Row(rsum=[504.0]), example.Row(rsum=[500.0])) == (4.0, None)
