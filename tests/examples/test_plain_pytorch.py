"""The loop without a Trainer: it learns, and fits on a screen."""

import inspect
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import plain_pytorch

    return plain_pytorch


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_learns_and_says_so(example, capsys):
    losses, before, after = example.main(["--epochs", "2"])
    assert losses[1] < losses[0]
    assert after > before + 30
    printed = capsys.readouterr().out
    assert f"loss {losses[1]:.3f}" in printed
    assert f"rsum {after:.1f}" in printed


def test_the_loop_is_short(example):
    assert len(inspect.getsource(example.train).splitlines()) <= 36
