"""Where a run is: what a checkpoint says of the data, and what the module's page claims of Lightning's hooks."""

import lightning as L
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_itm import write_shards
from tests.helpers.resume import EPOCHS, STEPS, Watch, fit
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
