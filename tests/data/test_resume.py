"""A run that stops anywhere and is resumed ends bit for bit like the uninterrupted one."""

import os
import signal

import lightning as L
import pytest
import torch

from lightning_itm import (
    QuintupletLoss,
    TripletLoss,
    write_shards,
)
from tests.helpers.resume import STEPS, PlainOptimizer, fit
from tests.helpers.tiny import SILENT, Tiny, tiny_data, tiny_pairs

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # each goes on where it was
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # some without ModelCheckpoint
]


def run_and_be_killed(*arguments, **options):
    child = os.fork()
    if child == 0:
        try:
            fit(*arguments, **options)
        finally:
            os._exit(1)  # not killed
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


LOADERS = {
    "no workers": {"num_workers": 0},
    "workers": {"num_workers": 2, "persistent_workers": False},
    "persistent workers": {"num_workers": 2, "persistent_workers": True},
}
ENCODINGS = ("pass", "training")
STOPS = {
    "end of an epoch": ({"every_n_epochs": 1}, STEPS, {}),
    "end of validation": ({"save_on_train_epoch_end": False}, STEPS, {}),
    "middle of an epoch": ({"every_n_train_steps": 5}, 15, {}),
    "last batch of an epoch": ({"every_n_train_steps": STEPS}, STEPS, {}),
    "kill -9": ({"every_n_train_steps": 5}, None, {"kill_at": 17}),
    "limit_train_batches": ({"every_n_train_steps": 7}, 14, {"limit_train_batches": 7}),
    "accumulated gradients, killed": ({"every_n_train_steps": 4}, None, {"kill_at": 9, "accumulate_grad_batches": 2}),
    "bf16": ({"every_n_train_steps": 5}, 15, {"precision": "bf16-mixed"}),
}


class PlainQuintuplet(PlainOptimizer):
    def __init__(self):
        super().__init__(QuintupletLoss())


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("model_class", [Tiny, PlainOptimizer])
def test_resumed_equals_uninterrupted(model_class, loader, stop, tmp_path):
    check_resumed(model_class, loader, stop, tmp_path)


def check_resumed(model_class, loader, stop, tmp_path, *, shards=None, **more):
    loader, (save, step, options) = LOADERS[loader] | ({"shards": shards} if shards else {}), STOPS[stop]
    kill_at, options = options.get("kill_at"), {name: value for name, value in options.items() if name != "kill_at"}
    options.update(more)
    expected, seen = fit(model_class, loader, tmp_path / "whole", save=save, **options)
    folder = tmp_path / "whole"
    if kill_at:
        folder = tmp_path / "killed"
        run_and_be_killed(model_class, loader, folder, save=save, kill_at=kill_at, **options)
        step = max(int(path.stem.split("=")[1]) for path in folder.iterdir())
        assert 0 < step < kill_at
    checkpoint = folder / f"step={step}.ckpt"
    resumed, seen_again = fit(model_class, loader, folder, save=save, resume_from=checkpoint, seed=99, **options)
    assert 0 < len(seen_again) < len(seen)
    assert seen_again == seen[-len(seen_again) :]
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name


class Quintuplet(Tiny):
    def __init__(self):
        super().__init__(QuintupletLoss(TripletLoss(negatives="selective")))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [stop for stop in STOPS if stop != "bf16"])
@pytest.mark.parametrize(
    ("loader", "mining"),
    [
        ("no workers", {}),
        ("workers", {}),
        ("persistent workers", {}),
        ("persistent workers", {"every_n_epochs": 2, "relative_margin": 0.01}),
        ("no workers", {"inject": "embeddings"}),
        *(
            (loader, {"inject": "batches", "group_size": 2, "encode": encode})
            for loader in LOADERS
            for encode in ENCODINGS
        ),
        ("workers", {"inject": "batches", "group_size": 4, "every_n_epochs": 2, "relative_margin": None}),
    ],
)
def test_with_mining_too(loader, mining, stop, tmp_path):
    check_resumed(Quintuplet, loader, stop, tmp_path, mining=mining)


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize(
    ("memory", "mining"),
    [
        ({}, None),
        ({"start_epoch": 0, "posterior": "published"}, None),
        ({"fill_during_warmup": True}, {}),
        ({"start_epoch": 0}, {"inject": "embeddings"}),
        ({"start_epoch": 0}, {"inject": "batches", "group_size": 2, "encode": "training"}),
    ],
)
def test_with_a_memory_bank_too(memory, mining, stop, tmp_path):
    check_resumed(Quintuplet, "workers", stop, tmp_path, mining=mining, memory=memory)


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["end of an epoch", "middle of an epoch", "last batch of an epoch", "kill -9", "bf16"])
@pytest.mark.parametrize(
    ("loader", "mining"),
    [
        ("no workers", None),
        ("workers", None),
        ("persistent workers", None),
        ("persistent workers", {}),
        ("workers", {"inject": "embeddings"}),
    ],
)
def test_streams_too(loader, mining, stop, tmp_path):
    write_shards(tiny_pairs(), tmp_path / "shards", images_per_shard=5)
    check_resumed(Quintuplet, loader, stop, tmp_path, shards=tmp_path / "shards", mining=mining)


@pytest.mark.parametrize(
    "mining", [{}, {"inject": "embeddings"}, *({"inject": "batches", "encode": encode} for encode in ENCODINGS)]
)
def test_mining_goes_on_after_the_last_epoch(mining, tmp_path):
    expected, _ = fit(PlainQuintuplet, {}, tmp_path / "whole", mining=mining, max_epochs=3)
    fit(PlainQuintuplet, {}, tmp_path, mining=mining, max_epochs=2, save={"every_n_epochs": 1})
    checkpoint = tmp_path / f"step={2 * STEPS}.ckpt"
    resumed, _ = fit(PlainQuintuplet, {}, tmp_path, mining=mining, max_epochs=3, resume_from=checkpoint, seed=9)
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())


def test_workers_change_nothing():
    results = [fit(Tiny, loader, name) for name, loader in LOADERS.items()]
    assert results[0][1] == results[1][1] == results[2][1]
    assert all(torch.equal(value, results[1][0][name]) for name, value in results[0][0].items())


class TestRandomStreams:
    def test_of_a_checkpoint_are_for_a_resumed_run_alone(self, tmp_path):
        """Who starts anew from its weights chooses a seed."""
        fit(Tiny, {}, tmp_path, save={"every_n_epochs": 1}, max_epochs=1)
        ends = []
        for seed in (1, 2):
            model = Tiny.load_from_checkpoint(tmp_path / f"step={STEPS}.ckpt", weights_only=True)
            L.seed_everything(seed, verbose=False)
            L.Trainer(max_epochs=1, **SILENT).fit(model, datamodule=tiny_data())
            ends.append(model.image_encoder[1].weight)
        assert not torch.equal(*ends)
