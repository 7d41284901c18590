import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_itm import (
    HardNegativeDataset,
    ImageTextDataModule,
    ImageTextDataset,
    ShardDataset,
    ShardStream,
    write_shards,
)
from lightning_itm.mining import NegativeTable
from lightning_itm.mining.attach import attach_draws, clear_draws, detach_draws, pairs_to_mine
from tests.helpers.pictures import cut_outs
from tests.helpers.tiny import NUM_IMAGES, tiny_data, tiny_pairs


def empty_table():
    return NegativeTable(NUM_IMAGES, 2 * NUM_IMAGES, texts_per_image=5, images_per_text=4)


@pytest.fixture
def stream(tmp_path):
    write_shards(tiny_pairs(), tmp_path / "shards")
    return ShardStream(ShardDataset(tmp_path / "shards"))


class TestPairsToMine:
    def test_are_without_what_wraps_them(self, stream):
        pairs, data = tiny_pairs(), tiny_data()
        assert pairs_to_mine(pairs, None) is pairs
        assert pairs_to_mine(HardNegativeDataset(pairs), data) is pairs
        assert pairs_to_mine(stream, None) is stream.pairs
        assert pairs_to_mine(None, data) is data.train_dataset

    def test_one_image(self):
        with pytest.raises(MisconfigurationException, match="at least two images to mine among, got 1"):
            pairs_to_mine(ImageTextDataset(cut_outs(1), [["a", "b"]]), None)

    def test_no_pairs(self):
        with pytest.raises(
            MisconfigurationException, match=r"pairs to mine, got list\. Give `dataset=ImageTextDataset"
        ):
            pairs_to_mine(None, ImageTextDataModule([1, 2, 3]))


class TestAttachAndDetach:
    def test_to_a_datamodule(self):
        data, table = tiny_data(), empty_table()
        pairs = data.train_dataset
        attach_draws(None, data, table, coupled_ranks=False)
        assert (data.train_dataset.pairs, data.train_dataset.table) == (pairs, table)
        assert not data.train_dataset.coupled_ranks
        detach_draws(None, data, table)
        assert data.train_dataset is pairs

    def test_to_a_dataset_that_the_user_wrapped(self):
        """The loader reads it, so it stays what it is and gets the table."""
        dataset, table = HardNegativeDataset(tiny_pairs()), empty_table()
        attach_draws(dataset, None, table, coupled_ranks=True)
        assert dataset.table is table
        data = tiny_data()
        data.train_dataset = dataset
        detach_draws(dataset, data, table)
        assert data.train_dataset is dataset

    def test_to_a_stream(self, stream):
        table = empty_table()
        attach_draws(stream, None, table, coupled_ranks=True)
        assert stream.negatives.table is table
        detach_draws(stream, None, empty_table())
        assert stream.negatives is not None, "those of another callback stay"
        detach_draws(stream, None, table)
        assert stream.negatives is None

    def test_pairs_that_no_loader_reads(self):
        for data in (None, tiny_data()):
            with pytest.raises(MisconfigurationException, match="No negative would reach a batch"):
                attach_draws(tiny_pairs(), data, empty_table(), coupled_ranks=True)


def test_embeddings_clear_the_draws_of_an_earlier_callback(stream):
    data = tiny_data()
    pairs = data.train_dataset
    for given, module in ((None, data), (stream, None)):
        attach_draws(given, module, empty_table(), coupled_ranks=True)
        clear_draws(given, module)
    assert data.train_dataset is pairs
    assert stream.negatives is None
