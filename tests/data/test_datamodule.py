import copy

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, Subset

from lightning_itm import ImageTextDataModule
from tests.helpers.fit import fit
from tests.helpers.resume import NUM_PAIRS, Watch
from tests.helpers.tiny import NUM_IMAGES, PLAIN, SILENT, Tiny, tiny_data, tiny_pairs


class TestOtherDatasets:
    def test_a_subset_is_augmented_anew_each_epoch_and_not_in_evaluation(self):
        half = Subset(tiny_pairs(), range(0, NUM_PAIRS, 2))
        data = ImageTextDataModule(half, half, batch_size=NUM_IMAGES, num_workers=0)
        watch = Watch()
        L.Trainer(callbacks=[watch], max_epochs=2, **SILENT).fit(Tiny(warmup_steps=0), datamodule=data)
        assert watch.seen[0][3] != watch.seen[1][3]
        batch = next(iter(data.val_dataloader()))
        assert torch.equal(batch["image"][0], PLAIN(tiny_pairs().images[0]))

    def test_a_loader_without_a_trainer_is_a_plain_one(self):
        loader = tiny_data().train_dataloader()
        orders = [[pair for batch in loader for pair in batch["text_id"].tolist()] for _ in range(2)]
        assert orders[0] != orders[1]
        assert sorted(orders[0]) == list(range(NUM_PAIRS))


class TestDropLast:
    BATCH_SIZE = 4  # two pairs do not fill a batch

    def left_out(self, drop_last):
        watch = Watch()
        data = tiny_data(batch_size=self.BATCH_SIZE, drop_last=drop_last)
        L.Trainer(callbacks=[watch], max_epochs=2, **SILENT).fit(Tiny(), datamodule=data)
        return [
            set(range(NUM_PAIRS)) - {pair for epoch, _, pairs, *_ in watch.seen if epoch == number for pair in pairs}
            for number in range(2)
        ]

    def test_leaves_other_pairs_out_in_each_epoch(self):
        first, second = self.left_out(drop_last=True)
        assert len(first) == len(second) == NUM_PAIRS % self.BATCH_SIZE
        assert first != second

    def test_or_none(self):
        assert self.left_out(drop_last=False) == [set(), set()]


def test_evaluation_takes_its_own_batch_size_and_every_pair_in_order():
    data = tiny_data(eval_batch_size=10, drop_last=True)
    batches = [batch["text_id"].tolist() for batch in data.val_dataloader()]
    assert [len(batch) for batch in batches] == [10, 10, 10, 10, NUM_PAIRS - 40]
    assert [pair for batch in batches for pair in batch] == list(range(NUM_PAIRS))


def test_another_trainer_that_validates_within_a_fit_changes_nothing(tmp_path):
    """It gets the same datamodule, and writes itself into `datamodule.trainer`."""

    class Measure(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 3:
                other = copy.deepcopy(pl_module)
                other._trainer = None
                L.Trainer(**SILENT).validate(other, datamodule=trainer.datamodule, verbose=False)

    seen, states = [], []
    for callbacks in ([], [Measure()]):
        watch, data = Watch(), tiny_data()
        trainer = L.Trainer(callbacks=[watch, *callbacks], max_epochs=3, max_steps=29, **SILENT)
        trainer.fit(Tiny(warmup_steps=0), datamodule=data)
        seen.append([(epoch, pairs) for epoch, _, pairs, *_ in watch.seen])
        states.append(data.state_dict())
    assert seen[0] == seen[1]
    assert states[0] == states[1]
    assert states[0]["batch"] == 29 - 2 * -(-NUM_PAIRS // 4)


def test_without_a_validation_set_there_is_no_loader_of_one():
    assert ImageTextDataModule(tiny_pairs(), num_workers=0).val_dataloader() == []


class TestASetThatIsTooSmall:
    """The error comes in `setup`: after one in `train_dataloader()`, Lightning leaves DataLoader patched for the process."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 64}, r"at least one batch of 64 pairs a rank, got 46 pairs"),
            (None, "`train_dataset` to be given"),
        ],
    )
    def test_leaves_dataloader_as_it_was(self, options, message):
        data = ImageTextDataModule(num_workers=0) if options is None else tiny_data(drop_last=True, **options)
        before = DataLoader.__init__
        with pytest.raises(MisconfigurationException, match=message):
            fit(Tiny, data)
        assert DataLoader.__init__ is before

    def test_may_be_read_by_a_subclass_after_setup(self):
        class Later(ImageTextDataModule):
            def setup(self, stage):
                super().setup(stage)
                self.train_dataset = tiny_pairs()

        assert fit(Tiny, Later(batch_size=4, num_workers=0), max_epochs=1).trainer.global_step == 11
