"""A stream of shards: every pair once in an epoch, on however many ranks and workers, and resumable."""

import functools
import http.server
import multiprocessing
import shutil
import threading
from collections import Counter

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, TQDMProgressBar

from lightning_itm import (
    ImageTextDataModule,
    ImageTextDataset,
    OfflineHardNegativeMining,
    ShardDataset,
    ShardStream,
    write_shards,
)
from lightning_itm.data.shards.loader import StreamedBatches, StreamLoader, batch_sizes, epoch_part
from tests.data.shards.test_dataset import img2dataset_sample, png, write_tar
from tests.helpers.tiny import AUGMENTED, PLAIN, SILENT, Tiny, tiny_pairs, tokenize

pytestmark = [
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),  # no validation set
    pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes"),  # more than there are cores
]

TRANSFORMS = {"transform": AUGMENTED, "eval_transform": PLAIN, "tokenizer": tokenize}


@pytest.fixture
def shards(tmp_path):
    """23 pictures with two texts each, in five shards."""
    write_shards(tiny_pairs(), tmp_path / "shards", images_per_shard=5)
    return ShardDataset(tmp_path / "shards", **TRANSFORMS)


def streamed(stream, *, num_workers, rank=0, world_size=1, batch_size=4, drop_last=False, epoch=0, done=0):
    batches = StreamedBatches(stream, batch_size, drop_last=drop_last, rank=rank, world_size=world_size, seed=3)
    loader = StreamLoader(batches, lambda: (epoch, done), num_workers=num_workers)
    read = list(loader)
    assert len(read) == len(loader) - done
    return read


def ids(batches):
    return [number for batch in batches for number in batch["text_id"].tolist()]


@given(
    num_pairs=st.integers(1, 300),
    batch_size=st.integers(1, 40),
    world_size=st.integers(1, 5),
    num_workers=st.integers(1, 5),
    drop_last=st.booleans(),
)
def test_shares_are_equal_and_cover_an_epoch(num_pairs, batch_size, world_size, num_workers, drop_last):
    sizes = batch_sizes(num_pairs, batch_size, drop_last=drop_last, world_size=world_size)
    counts = Counter()
    for rank in range(world_size):
        shares = [
            epoch_part(
                num_pairs,
                batch_size,
                drop_last=drop_last,
                rank=rank,
                world_size=world_size,
                worker=worker,
                num_workers=num_workers,
            )
            for worker in range(num_workers)
        ]
        turns = [shares[place % num_workers].batch_sizes[place // num_workers] for place in range(len(sizes))]
        assert turns == sizes
        assert all(share.stop - share.start == sum(share.batch_sizes) for share in shares)
        counts.update(place % num_pairs for share in shares for place in range(share.start, share.stop))
    if drop_last:
        assert (
            max(counts.values(), default=0) <= 1 + (num_pairs < world_size * -(-num_pairs // world_size)) * world_size
        )
    else:
        assert set(counts) == set(range(num_pairs))
        assert counts.total() == world_size * -(-num_pairs // world_size)


class TestEpoch:
    @pytest.mark.parametrize("world_size", [1, 2])
    @pytest.mark.parametrize("num_workers", [0, 2, 3])
    def test_every_pair_once_with_its_own_image(self, shards, world_size, num_workers):
        stream, view = ShardStream(shards, shuffle_buffer=7), shards.evaluation()
        stream.pairs = view
        epochs = [
            [
                streamed(stream, num_workers=num_workers, rank=rank, world_size=world_size, epoch=epoch)
                for rank in range(world_size)
            ]
            for epoch in range(2)
        ]
        orders = []
        for ranks in epochs:
            assert len({tuple(len(batch["text_id"]) for batch in rank) for rank in ranks}) == 1
            orders.append([ids(rank) for rank in ranks])
            assert sorted(number for rank in orders[-1] for number in rank) == list(range(46))
        assert orders[0] != orders[1]
        for batch in epochs[0][0]:
            for row, text_id in enumerate(batch["text_id"].tolist()):
                expected = view[text_id]
                assert torch.equal(batch["image"][row], expected["image"])
                assert torch.equal(batch["text"][row], expected["text"])
                assert int(batch["image_id"][row]) == expected["image_id"]

    @pytest.mark.forks
    def test_emoji_on_two_processes(self, tmp_path):
        """The example's pictures and names, over a real Trainer, on one and two processes, with none and two workers."""
        from examples.train_on_emoji import find_emoji

        emoji = find_emoji()[:601]
        names = [[item.name, *item.aliases] for item in emoji]
        names[-1] = [names[-1][0]] * (2 if sum(map(len, names[:-1])) % 2 == 0 else 1)
        pairs = ImageTextDataset([item.image for item in emoji], names)
        assert len(pairs) % 2 == 0  # else one would come twice on two processes
        write_shards(pairs, tmp_path / "emoji", images_per_shard=130)
        transforms = {"transform": PLAIN, "eval_transform": PLAIN, "tokenizer": tokenize}
        for devices in (1, 2):
            for num_workers in (0, 2):
                stream = ShardStream(ShardDataset(tmp_path / "emoji", **transforms), shuffle_buffer=100)
                name = f"{devices}-{num_workers}"
                data = ImageTextDataModule(stream, batch_size=64, num_workers=num_workers, drop_last=False)
                trainer = L.Trainer(
                    devices=devices,
                    strategy="ddp_fork" if devices > 1 else "auto",
                    max_epochs=2,
                    callbacks=[SaveIds(name)],
                    **SILENT,
                )
                trainer.fit(Tiny(warmup_steps=0), datamodule=data)
                for epoch in range(2):
                    seen = [text_id for rank in range(devices) for text_id in torch.load(f"{name}-{epoch}-{rank}.pt")]
                    assert sorted(seen) == list(range(len(pairs)))

    def test_augmentation_is_a_function_of_seed_epoch_and_pair(self, shards):
        def pictures(**options):
            batches = streamed(ShardStream(shards, shuffle_buffer=9), **options)
            return {
                number: image
                for batch in batches
                for number, image in zip(batch["text_id"].tolist(), batch["image"], strict=True)
            }

        one, two, later = pictures(num_workers=0), pictures(num_workers=2), pictures(num_workers=0, epoch=1)
        assert all(torch.equal(one[number], two[number]) for number in range(46))
        assert not all(torch.equal(one[number], later[number]) for number in range(46))

    @pytest.mark.parametrize("num_workers", [0, 2, 3])
    @pytest.mark.parametrize("done", [1, 2, 5, 11])
    def test_going_on_in_the_middle(self, shards, num_workers, done):
        stream = ShardStream(shards, shuffle_buffer=7)
        whole = streamed(stream, num_workers=num_workers, epoch=4)
        rest = streamed(stream, num_workers=num_workers, epoch=4, done=done)
        assert ids(rest) == ids(whole[done:])
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(rest, whole[done:], strict=True))

    @pytest.mark.parametrize("ranks", [7, 60])
    def test_fewer_pairs_than_places(self, shards, ranks):
        seen = [ids(streamed(ShardStream(shards), num_workers=0, rank=rank, world_size=ranks)) for rank in range(ranks)]
        assert {len(rank) for rank in seen} == {-(-46 // ranks)}
        assert {number for rank in seen for number in rank} == set(range(46))

    def test_overfitting_sees_the_same_pairs(self, shards):
        watch = SaveIds("overfit")
        data = ImageTextDataModule(ShardStream(shards, shuffle_buffer=7), batch_size=4, num_workers=0)
        trainer = L.Trainer(**SILENT, max_epochs=3, overfit_batches=2, callbacks=[watch])
        trainer.fit(Tiny(), datamodule=data)
        first, *others = (torch.load(f"overfit-{epoch}-0.pt") for epoch in range(3))
        assert len(first) == 8
        assert all(other == first for other in others)

    def test_no_worker_is_left_after_a_fit(self, shards):
        before = set(multiprocessing.active_children())
        data = ImageTextDataModule(ShardStream(shards), batch_size=4, num_workers=2)
        trainer = L.Trainer(**SILENT, max_epochs=2)
        trainer.fit(Tiny(), datamodule=data)
        assert set(multiprocessing.active_children()) <= before

    def test_resampled(self, shards):
        stream = ShardStream(shards, shuffle_buffer=7, resampled=True, pairs_per_epoch=200)
        for num_workers in (0, 2):
            both = [ids(streamed(stream, num_workers=num_workers, rank=rank, world_size=2)) for rank in range(2)]
            assert [len(rank) for rank in both] == [100, 100]
            counts = Counter(both[0] + both[1])
            assert max(counts.values()) > 1
            assert set(counts) <= set(range(46))

    def test_bad_input(self, shards):
        with pytest.raises(TypeError, match=r"Expected a ShardDataset, got ImageTextDataset\. Write other pairs"):
            ShardStream(tiny_pairs())
        with pytest.raises(ValueError, match="`shuffle_buffer` to be at least 1, got 0"):
            ShardStream(shards, shuffle_buffer=0)
        with pytest.raises(ValueError, match="`resampled=True` with `pairs_per_epoch`, got 9"):
            ShardStream(shards, pairs_per_epoch=9)
        with pytest.raises(MisconfigurationException, match="got 46 pairs"):
            ImageTextDataModule(ShardStream(shards), batch_size=64).train_dataloader()


class SaveIds(Callback):
    def __init__(self, name):
        self.name, self.ids = name, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.ids += batch["text_id"].tolist()

    def on_train_epoch_end(self, trainer, pl_module):
        torch.save(self.ids, f"{self.name}-{trainer.current_epoch}-{trainer.global_rank}.pt")
        self.ids = []


class WatchBar(TQDMProgressBar):
    """Note how long the real progress bar says an epoch is, and how far it comes."""

    def __init__(self):
        super().__init__()
        self.totals, self.reached, self.validated_at = [], [], []

    def on_train_epoch_end(self, trainer, pl_module):
        self.totals.append(self.train_progress_bar.total)
        self.reached.append(self.train_progress_bar.n)
        super().on_train_epoch_end(trainer, pl_module)

    def on_validation_start(self, trainer, pl_module):
        super().on_validation_start(trainer, pl_module)
        if not trainer.sanity_checking:
            self.validated_at.append(trainer.global_step)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("val_check_interval", "at"), [(0.25, [3, 6, 9, 12, 15, 18, 21, 24]), (5, [5, 10, 17, 22])])
def test_validation_within_an_epoch_and_the_progress_bar(shards, num_workers, val_check_interval, at, capsys):
    bar = WatchBar()
    trainer = L.Trainer(
        **{**SILENT, "enable_progress_bar": True},
        max_epochs=2,
        callbacks=[bar],
        val_check_interval=val_check_interval,
    )
    data = ImageTextDataModule(
        ShardStream(shards, shuffle_buffer=7), shards, batch_size=4, num_workers=num_workers, drop_last=False
    )
    trainer.fit(Tiny(), datamodule=data)
    assert trainer.num_training_batches == 12
    assert bar.totals == bar.reached == [12, 12]
    assert bar.validated_at == at
    assert trainer.global_step == 24


class TestFaults:
    def test_what_breaks_later_is_replaced_counted_and_named(self, tmp_path):
        """A broken image, and a shard that is cut off after it was indexed: ranks keep equal batches."""
        broken = img2dataset_sample(1, image=b"no image")
        write_tar(tmp_path / "00000.tar", [*img2dataset_sample(0), *broken, *img2dataset_sample(2)])
        write_tar(tmp_path / "00001.tar", [member for number in (3, 4, 5) for member in img2dataset_sample(number)])
        pairs = ShardDataset(tmp_path)
        path = tmp_path / "00001.tar"
        path.write_bytes(path.read_bytes()[: 3 * 1024 + 540])  # the second sample's image is gone
        with pytest.warns(
            UserWarning, match=r"(key 000000001 does not open|no longer in its shard \(.*00001\.tar, key 00)"
        ) as caught:
            batches = streamed(ShardStream(pairs), num_workers=0, batch_size=2)
        assert len([warning for warning in caught if "takes its place" in str(warning.message)]) == 1
        assert int(pairs.num_replaced) == 3
        assert [len(batch["text_id"]) for batch in batches] == [2, 2, 2]
        assert {0, 2, 3} == set(ids(batches))
        for batch in batches:
            numbers = (255 * batch["image"][:, 0, 0, 0]).round().int().tolist()
            assert batch["text"] == [f"number {number}" for number in numbers]

    def test_two_files_of_one_kind(self, tmp_path):
        """The index takes the first, so the stream does."""
        twice = [("000000001.JPG", png(200)), *img2dataset_sample(2)]
        write_tar(tmp_path / "0.tar", [*img2dataset_sample(0), *img2dataset_sample(1), *twice])
        with pytest.warns(UserWarning, match="1 with a key that came before"):
            pairs = ShardDataset(tmp_path)
        batches = streamed(ShardStream(pairs), num_workers=0, batch_size=3)
        numbers = (255 * batches[0]["image"][:, 0, 0, 0]).round().int().tolist()
        assert batches[0]["text"] == [f"number {number}" for number in numbers]
        assert sorted(numbers) == [0, 1, 2]

    def test_a_shard_that_disappears_is_an_error(self, shards, tmp_path):
        (tmp_path / "shards" / "00002.tar").unlink()
        with pytest.raises(FileNotFoundError, match=r"00002\.tar"):
            streamed(ShardStream(shards), num_workers=0)

    def test_nothing_readable(self, tmp_path):
        write_tar(tmp_path / "0.tar", [member for n in range(4) for member in img2dataset_sample(n, image=b"no image")])
        with pytest.warns(UserWarning, match="does not open"), pytest.raises(RuntimeError, match="None of the 4 pairs"):
            streamed(ShardStream(ShardDataset(tmp_path)), num_workers=0)


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
            assert check.num_seen == 46
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

    def test_no_index_for_remote_shards(self):
        with pytest.raises(ValueError, match="Expected `index`, the file in which to keep"):
            ShardDataset("https://example.com/{0..3}.tar")
