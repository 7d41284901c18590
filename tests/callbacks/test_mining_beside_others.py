"""Mining that joins a run late, beside callbacks that read batches early, after a fit that failed, and copied."""

import copy
import pickle
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder
from lightning.pytorch.tuner import Tuner

from lightning_itm import OfflineHardNegativeMining, QuintupletLoss, ShardDataset, ShardStream, write_shards
from tests.helpers.fit import fit
from tests.helpers.tiny import AUGMENTED, PLAIN, SILENT, Tiny, tiny_data, tiny_pairs, tokenize

TABLE = {"texts_per_image": 12, "images_per_text": 8}
BATCHES = {"inject": "batches", "group_size": 2, "relative_margin": None}


class Quintuplet(Tiny):
    def __init__(self):
        super().__init__(QuintupletLoss())


class Mined(Callback):
    """Keep the fraction of pairs that come with a mined negative, by epoch."""

    def __init__(self):
        self.found = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        found = (batch["hard"]["image_id"] >= 0).tolist() if "hard" in batch else [False] * len(batch["image_id"])
        self.found.setdefault(trainer.current_epoch, []).extend(found)

    @property
    def by_epoch(self):
        return {epoch: sum(found) / len(found) for epoch, found in self.found.items()}


class TestAnEpochThatPassedBy:
    """`start_epoch` is over when the callback comes: it mines at once, and not at the next turn, if ever."""

    SCHEDULES = (
        {"start_epoch": 1, "every_n_epochs": None},
        {"start_epoch": 1, "every_n_epochs": 4},
        {"start_epoch": 1},
    )

    @pytest.mark.parametrize("schedule", SCHEDULES)
    @pytest.mark.parametrize("workers", [0, 1])
    def test_in_a_resumed_run(self, schedule, workers, tmp_path):
        fit(Quintuplet, max_epochs=2).trainer.save_checkpoint(tmp_path / "a.ckpt")
        mined, data = Mined(), tiny_data(num_workers=workers)
        miner = OfflineHardNegativeMining(**TABLE, **schedule)
        fit(Quintuplet, data, miner, mined, max_epochs=4, resume_from=tmp_path / "a.ckpt")
        assert mined.by_epoch == {2: 1.0, 3: 1.0}

    def test_in_the_middle_of_an_epoch(self, tmp_path):
        fit(Quintuplet, max_steps=17).trainer.save_checkpoint(tmp_path / "a.ckpt")
        mined, miner = Mined(), OfflineHardNegativeMining(**TABLE, every_n_epochs=None)
        fit(Quintuplet, None, miner, mined, max_epochs=3, resume_from=tmp_path / "a.ckpt")
        assert mined.by_epoch == {1: 1.0, 2: 1.0}

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_in_a_second_fit_of_one_trainer(self, schedule):
        mined, data = Mined(), tiny_data()
        run = fit(Quintuplet, data, OfflineHardNegativeMining(**TABLE, **schedule), mined, max_epochs=2)
        run.trainer.fit_loop.max_epochs = 4
        run.trainer.fit(run.module, data)
        assert mined.by_epoch == {0: 0.0, 1: 1.0, 2: 1.0, 3: 1.0}

    def test_with_embeddings_of_training_that_come_only_after_an_epoch(self):
        miner = OfflineHardNegativeMining(**TABLE, **BATCHES, encode="training", every_n_epochs=None)
        fit(Quintuplet, None, miner, max_epochs=2)
        assert (miner.table.texts >= 0).all()


class Looks(Callback):
    """Read a batch before the fit starts, as the callbacks of Lightning that look for a setting do."""

    def on_fit_start(self, trainer, pl_module):
        next(iter(trainer.datamodule.train_dataloader()))


TOO_EARLY = r"nothing was mined before the first batch.*Put it after the mining"


class TestABatchBeforeMining:
    """The main process would wait for a worker, which waits for the table, which the main process makes."""

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("early", [Looks, lambda: LearningRateFinder(num_training_steps=4), BatchSizeFinder])
    def test_is_an_error(self, early, workers):
        with pytest.raises(RuntimeError, match=TOO_EARLY):
            fit(Quintuplet, tiny_data(num_workers=workers), early(), OfflineHardNegativeMining(**TABLE))

    def test_is_an_error_with_hard_batches(self):
        with pytest.raises(RuntimeError, match=r"no order was composed before the first batch"):
            fit(Quintuplet, tiny_data(num_workers=1), Looks(), OfflineHardNegativeMining(**TABLE, **BATCHES))

    def test_is_an_error_in_a_stream(self, tmp_path):
        write_shards(tiny_pairs(), tmp_path / "shards")
        pairs = ShardDataset(tmp_path / "shards", transform=AUGMENTED, eval_transform=PLAIN, tokenizer=tokenize)
        data = tiny_data(num_workers=1)
        data.train_dataset = ShardStream(pairs)
        with pytest.raises(RuntimeError, match=TOO_EARLY):
            fit(Quintuplet, data, Looks(), OfflineHardNegativeMining(**TABLE))

    @pytest.mark.parametrize("search", ["lr_find", "scale_batch_size"])
    def test_is_an_error_in_the_tuner(self, search):
        trainer = L.Trainer(callbacks=[OfflineHardNegativeMining(**TABLE)], max_epochs=1, **SILENT)
        with pytest.raises(RuntimeError, match="use these and the Tuner in a run without mining"):
            getattr(Tuner(trainer), search)(Quintuplet(), datamodule=tiny_data(num_workers=1))

    def test_after_mining_is_none(self):
        run = fit(Quintuplet, tiny_data(num_workers=1), OfflineHardNegativeMining(**TABLE), Looks(), max_epochs=1)
        assert run.trainer.global_step == 12


class Fails(Callback):
    def on_train_batch_end(self, trainer, *_):
        raise RuntimeError("on purpose")


class FailsInMining(Quintuplet):
    def encode_text(self, text):
        if not self.training:
            raise RuntimeError("on purpose")
        return super().encode_text(text)


@pytest.mark.parametrize("mining", [{}, BATCHES])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("module", "others"), [(FailsInMining, ()), (Quintuplet, (Fails(),))])
def test_after_a_fit_that_failed_the_next_one_has_no_old_negatives(module, others, workers, mining):
    data, mined = tiny_data(num_workers=workers), Mined()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, data, OfflineHardNegativeMining(**TABLE, **mining), *others, num_sanity_val_steps=0)
    assert data.awaited is None
    fit(Quintuplet, data, mined, max_epochs=1)
    assert mined.by_epoch == {0: 0.0}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mining", [{}, BATCHES])
def test_new_loaders_in_each_epoch_wait_for_its_table(mining, workers):
    """With `reload_dataloaders_every_n_epochs`, workers start before the epoch does."""
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            hard = batch.get("hard", {"image_id": batch["image_id"]})
            seen.append((trainer.current_epoch, batch["text_id"].tolist(), hard["image_id"].tolist()))

    runs = []
    for options in ({}, {"reload_dataloaders_every_n_epochs": 1}):
        seen.clear()
        miner = OfflineHardNegativeMining(**TABLE, **mining)
        fit(Quintuplet, tiny_data(num_workers=workers), miner, Watch(), seed=0, max_epochs=3, **options)
        assert not miner.table.is_pending
        runs.append(list(seen))
    assert runs[0] == runs[1]


class TestCopies:
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda miner: pickle.loads(pickle.dumps(miner))])
    def test_after_a_fit_have_the_table_and_no_file(self, copied):
        miner = OfflineHardNegativeMining(**TABLE)
        fit(Quintuplet, None, miner, max_epochs=1)
        again = copied(miner)
        assert torch.equal(again.table.texts, miner.table.texts)
        assert torch.equal(again.table.images, miner.table.images)
        again.table.clear()
        assert (miner.table.texts >= 0).any()
        again.table.remove()
        assert not Path(miner.table.path).exists()

    def test_within_a_fit_are_of_their_own(self):
        miner = OfflineHardNegativeMining(**TABLE)
        taken = []

        class Copies(Callback):
            def on_train_start(self, trainer, pl_module):
                taken.append((copy.deepcopy(miner.table), miner.table.texts.clone()))

        fit(Quintuplet, None, miner, Copies(), max_epochs=2)
        assert torch.equal(*(taken[0][0].texts, taken[0][1]))
        assert not torch.equal(miner.table.texts, taken[0][1])
