"""Pictures of a run, in the loggers that take pictures."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image

from lightning_itm import FalseNegativeElimination, GradientNormMonitor, OfflineHardNegativeMining, TripletLoss
from tests.helpers.fit import fit
from tests.helpers.tiny import Tiny, tiny_data

MINING = {"texts_per_image": 5, "images_per_text": 4, "inject": "embeddings"}
NAMES = {"mining/contact_sheet": 2, "memory/similarities": 2, "gradient/norms": 2}  # how often in two epochs
pytest.importorskip("tensorboard")
pytestmark = pytest.mark.filterwarnings("ignore:.*logging interval")


def callbacks(**options):
    return [
        OfflineHardNegativeMining(**MINING, **options),
        FalseNegativeElimination(8, momentum=0.9, **options),
        GradientNormMonitor(**options),
    ]


def run(logger, **options):
    # The selective rule is the monitor's, so the loss is a triplet loss.
    return fit(lambda: Tiny(TripletLoss()), tiny_data(), *callbacks(**options), seed=3, logger=logger)


def pictures(folder):
    """The pictures in the event files of a folder: a list of arrays `(height, width, 3)` for each name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return {
        name: [
            (event.step, np.asarray(Image.open(io.BytesIO(event.encoded_image_string))))
            for event in events.Images(name)
        ]
        for name in events.Tags()["images"]
    }


def test_tensorboard_has_pictures_that_show_something(tmp_path):
    backend = sys.modules["matplotlib"].rcParams._get_backend_or_none() if "matplotlib" in sys.modules else None
    logger = TensorBoardLogger(tmp_path)
    run(logger)
    found = pictures(logger.log_dir)
    assert {name: len(events) for name, events in found.items()} == NAMES
    for name, events in found.items():
        for _, pixels in events:
            assert min(pixels.shape[:2]) > 300
            is_drawn = (pixels != 255).any(axis=2)
            assert 0.02 < is_drawn.mean() < 0.9, name
            assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50, name
        Image.fromarray(events[-1][1]).save(tmp_path / f"{name.replace('/', '-')}.png")
    assert [step for step, _ in found["mining/contact_sheet"]] == [0, 12]
    assert [step for step, _ in found["gradient/norms"]] == [12, 24]
    import matplotlib
    from matplotlib import _pylab_helpers

    assert matplotlib.rcParams._get_backend_or_none() == backend, "a backend was chosen for the user"
    assert not _pylab_helpers.Gcf.figs, "a figure stayed open"


def test_a_run_with_pictures_trains_as_one_without(tmp_path):
    one, other = (run(logger) for logger in (TensorBoardLogger(tmp_path), False))
    for name, value in one.module.state_dict().items():
        assert torch.equal(value, other.module.state_dict()[name])
    assert one.metrics["train/loss"] == other.metrics["train/loss"]


def test_none_where_they_are_not_wanted(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    run(logger, log_figures=False)
    assert pictures(logger.log_dir) == {}


@pytest.mark.parametrize("has_logger", [True, False])
def test_nothing_is_drawn_without_a_logger_that_takes_pictures(has_logger, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    make = Figure.__init__
    monkeypatch.setattr(
        Figure, "__init__", lambda self, *args, **kwargs: drawn.append(1) or make(self, *args, **kwargs)
    )
    run(CSVLogger(tmp_path) if has_logger else False)
    assert drawn == []


def test_nothing_mined_is_no_error(tmp_path):
    logger, mining = TensorBoardLogger(tmp_path), OfflineHardNegativeMining(**MINING, max_score=-2.0)
    fit(Tiny, tiny_data(), mining, logger=logger, max_epochs=1)
    assert pictures(logger.log_dir) == {}


# After the imports: torchmetrics looks whether the package is installed, and then imports it.
WITHOUT = """
import logging, sys
from lightning.pytorch.loggers import TensorBoardLogger
from tests.callbacks.test_figures import run
for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
    del sys.modules[name]
sys.modules["matplotlib"] = None
logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
run(TensorBoardLogger("logs"))
"""


@pytest.mark.slow
def test_without_matplotlib_it_is_said_once():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("No figures are logged, because matplotlib is not installed") == 1
    assert 'pip install "lightning_itm[plot]"' in done.stderr
