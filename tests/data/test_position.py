"""Where a run is: what a checkpoint says of the data, and what the module's page claims of Lightning's hooks."""

import lightning as L
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_itm import write_shards
from tests.helpers.resume import EPOCHS, STEPS, PlainOptimizer, Watch, fit
from tests.helpers.tiny import SILENT, Tiny, tiny_data, tiny_pairs

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # each goes on where it was
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # some without ModelCheckpoint
]


def test_a_stream_goes_on_with_as_many_workers(tmp_path):
    write_shards(tiny_pairs(), tmp_path / "shards", images_per_shard=5)
    loader = {"shards": tmp_path / "shards", "num_workers": 2}
    fit(Tiny, loader, tmp_path / "run", save={"every_n_train_steps": 5})
    with pytest.raises(
        MisconfigurationException, match=r"stream with the `num_workers` 2, as when .* after batch 3 of epoch 1, got 1"
    ):
        fit(Tiny, {**loader, "num_workers": 0}, tmp_path / "run", resume_from=tmp_path / "run" / "step=15.ckpt")


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


class Hooks(L.Callback):
    """Record the hooks that come once per epoch, with the epoch, and when the loader asks for the position."""

    def __init__(self):
        self.seen = []

    def on_fit_start(self, trainer, pl_module):
        self.seen.append("fit start")

    def on_train_start(self, trainer, pl_module):
        self.seen.append("train start")

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append(f"epoch start {trainer.current_epoch}")

    def on_validation_start(self, trainer, pl_module):
        self.seen.append(f"validation {trainer.current_epoch}")

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append(f"epoch end {trainer.current_epoch}")


class TestHooks:
    """The order of hooks that the module's page explains, and on which the callbacks rely."""

    WHOLE_EPOCH = ("epoch start {0}", "validation {0}", "epoch end {0}")

    def hooks(self, model_class, resume_from=None, **save):
        hooks, data = Hooks(), tiny_data(num_workers=1, persistent_workers=True)
        next_batch = data._next_batch

        def ask():
            hooks.seen.append("position {}, {}".format(*next_batch()))
            return next_batch()

        data._next_batch = ask
        checkpoint = ModelCheckpoint(".", "{step}", save_top_k=-1, **save)
        options = {**SILENT, "max_epochs": 2, "enable_checkpointing": True, "num_sanity_val_steps": 0}
        trainer = L.Trainer(callbacks=[hooks, checkpoint], **options)
        trainer.fit(model_class(), datamodule=data, ckpt_path=resume_from, weights_only=True)
        return hooks.seen

    def test_of_a_fit_from_the_start(self):
        epoch_0, epoch_1 = ([name.format(epoch) for name in self.WHOLE_EPOCH] for epoch in range(2))
        second = [epoch_1[0], "position 1, 0", *epoch_1[1:]]
        assert self.hooks(PlainOptimizer) == ["fit start", "position 0, 0", "train start", *epoch_0, *second]
        # `Tiny` asks for `trainer.estimated_stepping_batches`.
        assert self.hooks(Tiny) == ["position 0, 0", "fit start", "train start", *epoch_0, *second]

    @pytest.mark.parametrize(
        ("save", "step", "expected"),
        [
            (
                {"every_n_epochs": 1},
                STEPS,
                ["position 1, 0", "train start", "epoch start 1", "validation 1", "epoch end 1"],
            ),
            (
                {"every_n_train_steps": 5},
                5,
                [
                    *("position 0, 5", "train start", "validation 0", "epoch end 0"),
                    *("epoch start 1", "position 1, 0", "validation 1", "epoch end 1"),
                ],
            ),
            (
                {"every_n_train_steps": STEPS},
                STEPS,
                ["position 1, 0", "train start", "epoch start 1", "validation 1", "epoch end 1"],
            ),
        ],
        ids=["end of an epoch", "middle of an epoch", "last batch of an epoch"],
    )
    def test_that_a_resume_skips(self, save, step, expected):
        self.hooks(PlainOptimizer, **save)
        assert self.hooks(PlainOptimizer, f"step={step}.ckpt") == ["fit start", *expected]
