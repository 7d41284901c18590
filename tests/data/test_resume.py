"""A run that stops anywhere and is resumed ends bit for bit like the uninterrupted one."""

import os
import random
import signal

import lightning as L
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import Subset

from lightning_itm import (
    FalseNegativeElimination,
    ImageTextDataModule,
    OfflineHardNegativeMining,
    QuintupletLoss,
    ShardDataset,
    ShardStream,
    TripletLoss,
    write_shards,
)
from lightning_itm.data.resumable_loader import SeededDataset
from tests.helpers.tiny import AUGMENTED, PLAIN, SILENT, Tiny, tiny_data, tiny_pairs, tokenize

STEPS = 12  # 46 pairs in batches of four, the last of two
EPOCHS = 3

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # each goes on where it was
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # some without ModelCheckpoint
]


class PlainOptimizer(Tiny):
    """Without `trainer.estimated_stepping_batches`, which makes the train loader earlier than it would be."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Watch(Callback):
    """Record the pairs that reach each step, and kill the process at one of them."""

    def __init__(self, kill_at=None):
        self.kill_at, self.seen = kill_at, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        hard, mined = batch.get("hard"), []
        if isinstance(hard, dict):
            mined = [hard["image_id_of_text"].tolist(), hard["image_id"].tolist()]
        if "memory" in batch:
            memory = batch["memory"]
            mined.append((memory.image_id.tolist(), memory.valid.tolist(), memory.image_embeddings.sum().item()))
        pairs = batch["text_id"].tolist()
        self.seen.append((trainer.current_epoch, batch_idx, pairs, batch["image"].sum().item(), *mined))


def fit(
    model_class,
    loader,
    folder=".",
    *,
    save=None,
    kill_at=None,
    resume_from=None,
    seed=0,
    mining=None,
    memory=None,
    **trainer_options,
):
    L.seed_everything(seed, verbose=False)
    watch, checkpoint = Watch(kill_at), ModelCheckpoint(folder, "{step}", save_top_k=-1, **(save or {}))
    options = {**SILENT, "max_epochs": EPOCHS, "enable_checkpointing": True, **trainer_options}
    model = model_class()
    miners = [] if mining is None else [OfflineHardNegativeMining(texts_per_image=12, images_per_text=8, **mining)]
    banks = [] if memory is None else [FalseNegativeElimination(16, min_count=4, **memory)]
    trainer = L.Trainer(callbacks=[*banks, watch, *miners, checkpoint], **options)
    data = tiny_data(**{name: value for name, value in loader.items() if name != "shards"})
    if "shards" in loader:
        transforms = {"transform": AUGMENTED, "eval_transform": PLAIN, "tokenizer": tokenize}
        data.train_dataset = ShardStream(ShardDataset(loader["shards"], **transforms), shuffle_buffer=9)
    trainer.fit(model, datamodule=data, ckpt_path=resume_from, weights_only=True)
    return model.state_dict(), watch.seen


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
        ({"start_epoch": 0, "weighting": "drop", "monotone": True, "positive": "online"}, None),
        ({"fill_during_warmup": True}, {}),
        ({"start_epoch": 0}, {"inject": "embeddings"}),
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


def test_a_stream_goes_on_with_as_many_workers(tmp_path):
    write_shards(tiny_pairs(), tmp_path / "shards", images_per_shard=5)
    loader = {"shards": tmp_path / "shards", "num_workers": 2}
    fit(Tiny, loader, tmp_path / "run", save={"every_n_train_steps": 5})
    with pytest.raises(
        MisconfigurationException, match=r"stream with the `num_workers` 2, as when .* after batch 3 of epoch 1, got 1"
    ):
        fit(Tiny, {**loader, "num_workers": 0}, tmp_path / "run", resume_from=tmp_path / "run" / "step=15.ckpt")


@pytest.mark.parametrize("mining", [{}, {"inject": "embeddings"}])
def test_mining_goes_on_after_the_last_epoch(mining, tmp_path):
    expected, _ = fit(PlainQuintuplet, {}, tmp_path / "whole", mining=mining, max_epochs=3)
    fit(PlainQuintuplet, {}, tmp_path, mining=mining, max_epochs=2, save={"every_n_epochs": 1})
    checkpoint = tmp_path / f"step={2 * STEPS}.ckpt"
    resumed, _ = fit(PlainQuintuplet, {}, tmp_path, mining=mining, max_epochs=3, resume_from=checkpoint, seed=9)
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())


def test_every_epoch_has_another_order_and_every_pair_once():
    _, seen = fit(Tiny, {})
    orders = [[pair for epoch, _, pairs, *_ in seen if epoch == number for pair in pairs] for number in range(EPOCHS)]
    assert all(sorted(order) == list(range(46)) for order in orders)
    assert len({tuple(order) for order in orders}) == EPOCHS


def test_workers_change_nothing():
    results = [fit(Tiny, loader, name) for name, loader in LOADERS.items()]
    assert results[0][1] == results[1][1] == results[2][1]
    assert all(torch.equal(value, results[1][0][name]) for name, value in results[0][0].items())


def test_loading_pairs_does_not_touch_the_random_streams():
    """Else dropout would draw other masks with workers than without."""
    pairs = SeededDataset(tiny_data().train_dataset)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    pairs[3]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()


class TestPosition:
    """What a checkpoint says of the data, where it is read in another way than by the run that goes on."""

    def stopped_after_five_batches(self, folder, **options):
        fit(Tiny, {}, folder, save={"every_n_train_steps": 5}, max_steps=5, **options)
        return folder / "step=5.ckpt"

    def test_a_test_of_a_checkpoint_leaves_the_next_fit_alone(self, tmp_path):
        checkpoint = self.stopped_after_five_batches(tmp_path)
        model, data, watch = Tiny(), tiny_data(), Watch()
        trainer = L.Trainer(callbacks=[watch], max_epochs=1, **SILENT)
        trainer.test(model, datamodule=data, ckpt_path=checkpoint, weights_only=True, verbose=False)
        trainer.fit(model, datamodule=data)
        assert len(watch.seen) == STEPS

    def test_another_batch_size_in_the_middle_of_an_epoch(self, tmp_path):
        checkpoint = self.stopped_after_five_batches(tmp_path)
        with pytest.raises(
            Exception, match=r"`batch_size` 4 on 1 process\(es\), .* after batch 5 of epoch 0, got 8 on 1"
        ):
            fit(Tiny, {"batch_size": 8}, tmp_path, resume_from=checkpoint)

    def test_a_run_that_max_steps_broke_off_goes_on_with_the_rest_of_the_epoch(self, tmp_path):
        _, whole = fit(Tiny, {}, tmp_path / "whole", max_epochs=1)
        L.seed_everything(0, verbose=False)
        trainer = L.Trainer(max_steps=5, **SILENT)
        trainer.fit(Tiny(), datamodule=tiny_data())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        _, seen = fit(Tiny, {}, tmp_path / "rest", resume_from=tmp_path / "a.ckpt", max_epochs=2)
        assert [row[2] for row in seen][:7] == [row[2] for row in whole][5:]

    def test_who_looks_at_a_batch_first_takes_nothing(self, tmp_path):
        checkpoint = self.stopped_after_five_batches(tmp_path)

        class Look(Watch):
            def on_fit_start(self, trainer, pl_module):
                next(iter(trainer.datamodule.train_dataloader()))

        _, expected = fit(Tiny, {}, tmp_path / "whole")
        L.seed_everything(0, verbose=False)
        look = Look()
        trainer = L.Trainer(callbacks=[look], max_epochs=EPOCHS, **SILENT)
        trainer.fit(Tiny(), datamodule=tiny_data(), ckpt_path=checkpoint, weights_only=True)
        assert look.seen == expected[5:]


class TestOtherDatasets:
    def test_a_subset_is_augmented_anew_each_epoch_and_not_in_evaluation(self):
        half = Subset(tiny_pairs(), range(0, 46, 2))
        data = ImageTextDataModule(half, half, batch_size=23, num_workers=0)
        watch = Watch()
        L.Trainer(callbacks=[watch], max_epochs=2, **SILENT).fit(Tiny(warmup_steps=0), datamodule=data)
        assert watch.seen[0][3] != watch.seen[1][3]
        batch = next(iter(data.val_dataloader()))
        assert torch.equal(batch["image"][0], PLAIN(tiny_pairs().images[0]))

    def test_a_loader_without_a_trainer_is_a_plain_one(self):
        loader = tiny_data().train_dataloader()
        orders = [[pair for batch in loader for pair in batch["text_id"].tolist()] for _ in range(2)]
        assert orders[0] != orders[1]
        assert sorted(orders[0]) == list(range(46))


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
