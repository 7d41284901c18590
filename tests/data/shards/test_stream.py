"""The plan of an epoch: which shards, in which order, and with which mined negatives."""

import functools
import http.server
import shutil
import threading
from collections import Counter

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback

from lightning_itm import ImageTextDataModule, OfflineHardNegativeMining, ShardDataset, ShardStream
from tests.helpers.shards import TRANSFORMS, ids, img2dataset_sample, png, streamed, write_tar
from tests.helpers.tiny import NUM_IMAGES, PLAIN, SILENT, Tiny, tiny_pairs

pytestmark = pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")  # no validation set

NUM_TEXTS = 2 * NUM_IMAGES


def test_bad_input(shards):
    with pytest.raises(TypeError, match=r"Expected a ShardDataset, got ImageTextDataset\. Write other pairs"):
        ShardStream(tiny_pairs())
    with pytest.raises(ValueError, match="`shuffle_buffer` to be at least 1, got 0"):
        ShardStream(shards, shuffle_buffer=0)
    with pytest.raises(ValueError, match="`resampled=True` with `pairs_per_epoch`, got 9"):
        ShardStream(shards, pairs_per_epoch=9)
    with pytest.raises(MisconfigurationException, match=f"got {NUM_TEXTS} pairs"):
        ImageTextDataModule(ShardStream(shards), batch_size=64).train_dataloader()


def test_resampled(shards):
    stream = ShardStream(shards, shuffle_buffer=7, resampled=True, pairs_per_epoch=200)
    for num_workers in (0, 2):
        both = [ids(streamed(stream, num_workers=num_workers, rank=rank, world_size=2)) for rank in range(2)]
        assert [len(rank) for rank in both] == [100, 100]
        counts = Counter(both[0] + both[1])
        assert max(counts.values()) > 1
        assert set(counts) <= set(range(NUM_TEXTS))


def test_two_files_of_one_kind(tmp_path):
    """The index takes the first, so the stream does."""
    twice = [("000000001.JPG", png(200)), *img2dataset_sample(2)]
    write_tar(tmp_path / "0.tar", [*img2dataset_sample(0), *img2dataset_sample(1), *twice])
    with pytest.warns(UserWarning, match="1 with a key that came before"):
        pairs = ShardDataset(tmp_path)
    batches = streamed(ShardStream(pairs), num_workers=0, batch_size=3)
    numbers = (255 * batches[0]["image"][:, 0, 0, 0]).round().int().tolist()
    assert batches[0]["text"] == [f"number {number}" for number in numbers]
    assert sorted(numbers) == [0, 1, 2]


def test_a_shard_that_disappears_is_an_error(shards, tmp_path):
    (tmp_path / "shards" / "00002.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"00002\.tar"):
        streamed(ShardStream(shards), num_workers=0)


class Negatives(Callback):
    """Check that every negative that reaches a step is one of the table's, with the picture and text of its ids."""

    def __init__(self, pairs, miner):
        self.view, self.miner, self.num_seen = pairs.evaluation(), miner, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        table = self.miner.table
        for row, (image_id, text_id) in enumerate(
            zip(batch["image_id"].tolist(), batch["text_id"].tolist(), strict=True)
        ):
            if not isinstance(batch["hard"], dict):
                hard_image = int(batch["hard"].image_id[row])
            else:
                hard_image = int(batch["hard"]["image_id"][row])
                of_text = int(batch["hard"]["image_id_of_text"][row])
                assert of_text in self.view.text_image_id[table.texts[image_id].clamp_min(0)].tolist()
                assert torch.equal(batch["hard"]["image_of_text"][row], self.view.load_image(of_text))
            assert hard_image in table.images[text_id].tolist()
            assert hard_image != image_id
            self.num_seen += 1


class TestMining:
    @pytest.mark.parametrize("num_workers", [0, 2])
    @pytest.mark.parametrize("inject", ["samples", "embeddings"])
    def test_the_table_is_that_of_the_pairs(self, shards, inject, num_workers):
        shards.transform = PLAIN  # so that pictures can be compared
        tables = []
        for dataset in (shards, ShardStream(shards, shuffle_buffer=11)):
            L.seed_everything(0, verbose=False)
            miner = OfflineHardNegativeMining(texts_per_image=9, images_per_text=6, inject=inject)
            check = Negatives(shards, miner)
            data = ImageTextDataModule(dataset, batch_size=4, num_workers=num_workers, drop_last=False)
            trainer = L.Trainer(**SILENT, max_epochs=1, callbacks=[miner, check])
            trainer.fit(Tiny(), datamodule=data)
            assert check.num_seen == NUM_TEXTS
            tables.append(miner.table)
        assert torch.equal(tables[0].texts, tables[1].texts)
        assert torch.equal(tables[0].images, tables[1].images)
        assert dataset.negatives is None  # as it was

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_remote_shards(self, shards, num_workers, tmp_path):
        """Served over HTTP, and through a pipe: indexed once, trained on, and mined by embeddings in one pass more."""
        folder = tmp_path / "shards"
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
        handler.func.log_message = lambda *_: None
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        urls = [f"pipe:cat {folder}/{{00000..00004}}.tar"]
        if shutil.which("curl"):
            urls.append(f"http://127.0.0.1:{server.server_port}/{{00000..00004}}.tar")
        for number, url in enumerate(urls):
            remote = ShardDataset(url, index=tmp_path / f"{number}.index", **TRANSFORMS)
            assert list(remote.texts) == list(shards.texts)
            assert not remote.is_local
            stream = ShardStream(remote, shuffle_buffer=11)
            tables = []
            for dataset in (shards, stream):
                L.seed_everything(0, verbose=False)
                miner = OfflineHardNegativeMining(
                    texts_per_image=9, images_per_text=6, inject="embeddings", batch_size=5
                )
                data = ImageTextDataModule(dataset, batch_size=4, num_workers=num_workers, drop_last=False)
                L.Trainer(**SILENT, max_epochs=1, callbacks=[miner]).fit(Tiny(), datamodule=data)
                tables.append(miner.table)
            assert torch.equal(tables[0].texts, tables[1].texts)
            assert torch.equal(tables[0].images, tables[1].images)
            with pytest.raises(RuntimeError, match="Expected local shards to read image 0 at random"):
                remote[0]
            data = ImageTextDataModule(stream, batch_size=4)
            with pytest.raises(MisconfigurationException, match="local shards with `inject='samples'`"):
                L.Trainer(**SILENT, max_epochs=1, callbacks=[OfflineHardNegativeMining()]).fit(Tiny(), datamodule=data)
        server.shutdown()
        server.server_close()


def test_pairs_carry_the_number_of_their_caption(tmp_path):
    samples = [img2dataset_sample(number, caption) for number, caption in enumerate(["a mug", "a cup", "A MUG"])]
    write_tar(tmp_path / "0.tar", [member for sample in samples for member in sample])
    with pytest.warns(UserWarning, match="2 of 3 pairs share their caption") as record:
        pairs = ShardDataset(tmp_path)
    assert record[0].filename == __file__, "the line that made the set"
    (batch,) = streamed(ShardStream(pairs), num_workers=0, batch_size=3)
    assert batch["caption_id"].tolist() == [[0, 1, 0][text_id] for text_id in batch["text_id"].tolist()]
    (batch,) = streamed(ShardStream(ShardDataset(tmp_path, equal_captions="keep")), num_workers=0, batch_size=3)
    assert "caption_id" not in batch
