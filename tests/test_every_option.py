"""Every option that trains, trains: each loss with each source of negatives, from a converged small model."""

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
MOST_LOST = 4.0  # rsum, of 600
MOST_COSINE = 0.15  # mean over pairs that do not match: a collapse is near 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_setting_falls_behind_its_loss_alone(monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location("every_option", FOLDER / "every_option.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "every_option", module)
    spec.loader.exec_module(module)
    outcomes = module.run_seed(0, epochs=3)
    for (loss, source), outcome in outcomes.items():
        if loss == "start":
            continue
        alone = outcomes[loss, "alone"]
        assert outcome.rsum > alone.rsum - MOST_LOST, (loss, source, outcome, alone)
        assert outcome.cosine < max(MOST_COSINE, alone.cosine + MOST_COSINE), (loss, source, outcome)
    assert len(outcomes) > 30
