import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_itm import HardNegativeDataset, ImageTextDataModule, ShardDataset, ShardStream, write_shards
from lightning_itm.data import random_order
from lightning_itm.mining import NegativeTable
from lightning_itm.mining.injection import BatchInjection, EmbeddingInjection, SampleInjection
from tests.helpers.tiny import NUM_IMAGES, SILENT, tiny_data, tiny_pairs

NUM_PAIRS = 2 * NUM_IMAGES


def empty_table():
    return NegativeTable(NUM_IMAGES, NUM_PAIRS, texts_per_image=5, images_per_text=4)


def full_table():
    """Where the texts of the next image are hard for an image, and the next image is hard for a text."""
    table, images = empty_table(), torch.arange(NUM_IMAGES)
    table.texts[:, 0] = 2 * ((images + 1) % NUM_IMAGES)
    table.images[:, 0] = (images.repeat_interleave(2) + 1) % NUM_IMAGES
    return table


@pytest.fixture
def trainer():
    return L.Trainer(**SILENT)


@pytest.fixture
def stream(tmp_path):
    write_shards(tiny_pairs(), tmp_path / "shards")
    return ShardStream(ShardDataset(tmp_path / "shards"))


class TestSamples:
    def test_to_a_datamodule(self, trainer):
        data, table = tiny_data(), empty_table()
        pairs, injection = data.train_dataset, SampleInjection(None, table, coupled_ranks=False)
        injection.attach(data, trainer)
        assert (data.train_dataset.pairs, data.train_dataset.table) == (pairs, table)
        assert not data.train_dataset.coupled_ranks
        injection.detach(data)
        assert data.train_dataset is pairs

    def test_to_a_dataset_that_the_user_wrapped(self, trainer):
        """The loader reads it, so it stays what it is and gets the table."""
        dataset, table = HardNegativeDataset(tiny_pairs()), empty_table()
        injection = SampleInjection(dataset, table)
        injection.attach(None, trainer)
        assert dataset.table is table
        data = tiny_data()
        data.train_dataset = dataset
        injection.detach(data)
        assert data.train_dataset is dataset

    def test_to_a_stream(self, stream, trainer):
        table = empty_table()
        injection = SampleInjection(stream, table)
        injection.attach(None, trainer)
        assert stream.negatives.table is table
        SampleInjection(stream, empty_table()).detach(None)
        assert stream.negatives is not None, "those of another callback stay"
        injection.detach(None)
        assert stream.negatives is None

    def test_pairs_that_no_loader_reads(self, trainer):
        for data in (None, tiny_data()):
            with pytest.raises(MisconfigurationException, match="No negative would reach a batch"):
                SampleInjection(tiny_pairs(), empty_table()).attach(data, trainer)


@pytest.mark.parametrize("injection", [EmbeddingInjection, BatchInjection])
def test_pairs_come_without_the_draws_of_an_earlier_callback(injection, trainer):
    data = tiny_data()
    pairs = data.train_dataset
    SampleInjection(None, empty_table()).attach(data, trainer)
    injection(None, empty_table()).attach(data, trainer)
    assert data.train_dataset is pairs


def test_a_stream_gives_embeddings_without_the_draws_of_an_earlier_callback(stream, trainer):
    SampleInjection(stream, empty_table()).attach(None, trainer)
    EmbeddingInjection(stream, empty_table()).attach(None, trainer)
    assert stream.negatives is None


class TestBatches:
    def attached(self, trainer, table=None, data=None, **options):
        data = tiny_data(**(data or {}))
        injection = BatchInjection(None, empty_table() if table is None else table, **{"group_size": 2, **options})
        injection.attach(data, trainer)
        return data, injection

    def test_the_datamodule_gets_the_order_of_each_epoch(self, trainer):
        data, injection = self.attached(trainer, full_table())
        assert data.train_order.is_pending, "a worker waits"
        orders = []
        for epoch in range(2):
            injection.begin_epoch(epoch)
            orders.append(data.train_order.pairs.tolist())
        assert not data.train_order.is_pending
        assert sorted(orders[0]) == sorted(orders[1]) == list(range(NUM_PAIRS))
        assert orders[0] != orders[1]
        injection.detach(data)
        assert data.train_order is None

    def test_before_anything_is_mined_the_order_is_that_of_a_run_without(self, trainer):
        data, injection = self.attached(trainer)
        injection.begin_epoch(3)
        assert torch.equal(data.train_order.pairs, random_order(NUM_PAIRS, data.seed, 3).int())

    def test_an_order_that_a_callback_left_behind_is_forgotten(self, trainer):
        """After a fit that ended with an error, whose teardown Lightning does not run."""
        data, _ = self.attached(trainer)
        data.setup("fit")
        assert data.train_order is None

    def test_goes_on_in_the_order_of_a_checkpoint(self, trainer):
        _, injection = self.attached(trainer, full_table())
        injection.begin_epoch(4)
        state = {**injection.state_dict(), "epoch": 4, "is_finished": False}
        data, resumed = self.attached(trainer, data={"seed": 9})
        resumed.resume(state, torch.device("cpu"))
        assert torch.equal(data.train_order.pairs, injection.order.pairs)
        data, resumed = self.attached(trainer)
        resumed.resume({**state, "is_finished": True}, torch.device("cpu"))
        assert data.train_order.is_pending, "the order of an epoch that is over is of no use"

    def test_overfit_batches_keeps_the_batches_of_the_first_epoch(self):
        data, injection = self.attached(L.Trainer(overfit_batches=2, **SILENT), full_table())
        injection.begin_epoch(0)
        first = data.train_order.pairs.clone()
        injection.begin_epoch(1)
        assert torch.equal(data.train_order.pairs, first)

    def test_a_stream(self, stream, trainer):
        with pytest.raises(MisconfigurationException, match=r"got a ShardStream.* Train on its `ShardDataset`"):
            BatchInjection(stream, empty_table()).attach(ImageTextDataModule(stream), trainer)

    def test_a_loader_of_the_users_own(self, trainer):
        with pytest.raises(MisconfigurationException, match=r"got NoneType.* call `lightning_itm.mining.compose"):
            BatchInjection(tiny_pairs(), empty_table()).attach(None, trainer)
        with pytest.raises(MisconfigurationException, match="got another set in the datamodule"):
            BatchInjection(tiny_pairs(), empty_table()).attach(tiny_data(), trainer)

    def test_groups_that_do_not_fit(self, trainer):
        with pytest.raises(ValueError, match=r"`group_size` to divide 4, .*, got 3. Choose one of \[1, 2, 4\]"):
            self.attached(trainer, group_size=3)
        with pytest.raises(ValueError, match=r"`group_size` to divide 4, .*, got 8"):
            self.attached(trainer, group_size=8)
        with pytest.raises(ValueError, match="at least one batch of 48 pairs on all ranks together, got 46 pairs"):
            self.attached(trainer, data={"batch_size": 48})
