"""A run that ends within an epoch, or within mining, goes on as if it had not ended."""

import os
import signal
import time

import pytest
import torch
from lightning.pytorch.callbacks import Callback, Timer

from lightning_itm import OfflineHardNegativeMining, QuintupletLoss
from tests.helpers import fit as one
from tests.helpers.resume import STEPS, PlainOptimizer, fit
from tests.helpers.tiny import tiny_data

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings(
        "ignore:Be aware that when using `ckpt_path`"
    ),  # the Timer takes part in the first run alone
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
EPOCHS = 3
MININGS = {
    "none": None,
    "samples": {},
    "samples, every second epoch": {"every_n_epochs": 2},
    "embeddings": {"inject": "embeddings"},
    "batches": {"inject": "batches", "group_size": 2},
    "batches of training": {"inject": "batches", "group_size": 2, "encode": "training"},
}


class Quintuplet(PlainOptimizer):
    """With a constant learning rate: a cosine would end where `max_steps` ends."""

    def __init__(self):
        super().__init__(QuintupletLoss())


class Stop(Callback):
    """Set `should_stop` at a step, as EarlyStopping does."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop |= trainer.global_step == self.step


class WaitForTheTimer(Stop):
    """Take so long for a step that `max_time` is over."""

    def on_train_batch_end(self, trainer, *_):
        timer = next(callback for callback in trainer.callbacks if isinstance(callback, Timer))
        while trainer.global_step == self.step and timer.time_remaining() > 0:
            time.sleep(0.01)


STOPS = {
    "max_steps in the middle of an epoch": lambda: {"max_steps": 17},
    "max_steps at the end of an epoch": lambda: {"max_steps": 2 * STEPS},
    "should_stop": lambda: {"callbacks": [Stop(17)]},
    "should_stop at the end of an epoch": lambda: {"callbacks": [Stop(STEPS)]},
    "max_time": lambda: {"max_time": {"seconds": 2}, "callbacks": [WaitForTheTimer(5)]},
}


def check_goes_on(whole, first, resume_from, loader, mining, **options):
    expected, seen = whole
    resumed, rest = fit(Quintuplet, loader, "rest", mining=mining, resume_from=resume_from, seed=99, **options)
    assert 0 < len(first) < len(seen)
    assert first + rest == seen
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("stop", STOPS)
def test_goes_on(stop, mining, workers, tmp_path):
    loader, mining = {"num_workers": workers}, MININGS[mining]
    whole = fit(Quintuplet, loader, tmp_path / "whole", mining=mining)
    stopped = STOPS[stop]()
    callbacks = stopped.pop("callbacks", ())
    _, first = fit(Quintuplet, loader, tmp_path / "first", mining=mining, callbacks=callbacks, **stopped)
    check_goes_on(whole, first, tmp_path / "first" / f"step={len(first)}.ckpt", loader, mining)


@pytest.mark.parametrize("stop", ["max_steps in the middle of an epoch", "max_steps at the end of an epoch"])
def test_goes_on_with_more_steps(stop, tmp_path):
    """With `max_steps`, Lightning resumes in another way than with `max_epochs`."""
    whole = fit(Quintuplet, {}, tmp_path / "whole", mining={}, max_epochs=None, max_steps=40)
    _, first = fit(Quintuplet, {}, tmp_path / "first", mining={}, max_epochs=None, **STOPS[stop]())
    checkpoint = tmp_path / "first" / f"step={len(first)}.ckpt"
    check_goes_on(whole, first, checkpoint, {}, {}, max_epochs=None, max_steps=40)


@pytest.mark.parametrize("mining", ["none", "samples", "batches"])
@pytest.mark.parametrize("then", [STEPS + 2, 2 * STEPS, 2 * STEPS + 1])
def test_goes_on_twice(then, mining, tmp_path):
    """First from the last batch of an epoch, where Lightning would count the start of the next one wrong."""
    options = {"mining": MININGS[mining], "save": {"every_n_train_steps": 1}}
    expected, seen = fit(Quintuplet, {}, tmp_path / "whole", **options)
    for start in (STEPS, then):
        folder = tmp_path / ("whole" if start == STEPS else "second")
        resume = {"resume_from": folder / f"step={start}.ckpt", "seed": 99}
        resumed, rest = fit(Quintuplet, {}, tmp_path / "second", **options, **resume)
        assert rest == seen[start:]
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name


class Interrupted(Quintuplet):
    """Press Ctrl+C at the second input of the pass that mines for the second epoch."""

    def encode_text(self, text):
        if not self.training and self.trainer.training and self.global_step == STEPS and len(text) < 2 * STEPS:
            os.kill(os.getpid(), signal.SIGINT)
        return super().encode_text(text)


@pytest.fixture
def restored_signals():
    """Take Ctrl+C as Python does. A shell's background job ignores it, and Lightning does after the first."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("restored_signals")
@pytest.mark.parametrize("mining", ["samples", "embeddings", "batches"])
def test_mining_that_is_interrupted_is_not_done(mining, tmp_path):
    mining = {**MININGS[mining], "batch_size": 2 * STEPS}  # the second batch of texts is smaller
    save = {"save_on_exception": True, "every_n_epochs": 99}
    whole = fit(Quintuplet, {}, tmp_path / "whole", mining=mining)
    with pytest.raises(SystemExit):
        fit(Interrupted, {}, tmp_path / "first", mining=mining, save=save)
    checkpoint = tmp_path / "first" / f"step={STEPS}.ckpt"
    check_goes_on(whole, whole[1][:STEPS], checkpoint, {}, mining)


class Fails(Quintuplet):
    def encode_text(self, text):
        if not self.training and self.trainer.training and self.global_step == STEPS:
            raise RuntimeError("out of memory, on purpose")
        return super().encode_text(text)


def test_an_error_in_mining_costs_no_epoch(tmp_path):
    whole = fit(Quintuplet, {}, tmp_path / "whole", mining={})
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(Fails, {}, tmp_path / "first", mining={})
    check_goes_on(whole, whole[1][:STEPS], tmp_path / "first" / f"step={STEPS}.ckpt", {}, {})


def test_nothing_is_mined_for_an_epoch_that_never_comes():
    tables = []
    for options in ({"max_epochs": 1}, {"max_steps": STEPS}, {"max_steps": STEPS + 5}):
        miner = OfflineHardNegativeMining(texts_per_image=12, images_per_text=8, every_n_epochs=2)
        one.fit(Quintuplet, tiny_data(), miner, seed=0, **{"max_epochs": 4, **options})
        tables.append(miner.table.texts)
    assert torch.equal(tables[0], tables[1])
    assert torch.equal(tables[0], tables[2])
