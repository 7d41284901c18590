"""Every pair once in an epoch, on however many ranks and workers, resumable, and with equal batches when images break."""

import multiprocessing
from collections import Counter

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback, TQDMProgressBar

from lightning_itm import ImageTextDataModule, ImageTextDataset, ShardDataset, ShardStream, write_shards
from lightning_itm.data.shards.loader import batch_sizes, epoch_part
from tests.helpers.shards import ids, img2dataset_sample, streamed, write_tar
from tests.helpers.tiny import NUM_IMAGES, PLAIN, SILENT, Tiny, tokenize

pytestmark = [
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),  # no validation set
    pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes"),  # more than there are cores
]

NUM_TEXTS = 2 * NUM_IMAGES


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


@given(
    num_pairs=st.integers(1, 300),
    batch_size=st.integers(1, 40),
    world_size=st.integers(1, 5),
    num_workers=st.integers(1, 5),
    drop_last=st.booleans(),
)
def test_parts_are_equal_and_cover_an_epoch(num_pairs, batch_size, world_size, num_workers, drop_last):
    sizes = batch_sizes(num_pairs, batch_size, drop_last=drop_last, world_size=world_size)
    counts = Counter()
    for rank in range(world_size):
        parts = [
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
        turns = [parts[index % num_workers].batch_sizes[index // num_workers] for index in range(len(sizes))]
        assert turns == sizes
        assert all(part.stop - part.start == sum(part.batch_sizes) for part in parts)
        counts.update(index % num_pairs for part in parts for index in range(part.start, part.stop))
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
            assert sorted(number for rank in orders[-1] for number in rank) == list(range(NUM_TEXTS))
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
        from examples.emoji_data import find_emoji

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
        assert all(torch.equal(one[number], two[number]) for number in range(NUM_TEXTS))
        assert not all(torch.equal(one[number], later[number]) for number in range(NUM_TEXTS))

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
        assert {len(rank) for rank in seen} == {-(-NUM_TEXTS // ranks)}
        assert {number for rank in seen for number in rank} == set(range(NUM_TEXTS))

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
        pairs = ShardDataset(tmp_path, max_unreadable=0.5)
        path = tmp_path / "00001.tar"
        path.write_bytes(path.read_bytes()[: 3 * 1024 + 540])  # the second sample's image is gone
        with pytest.warns(
            UserWarning, match=r"(key 000000001 does not open|no longer in its shard \(.*00001\.tar, key 00)"
        ) as caught:
            batches = streamed(ShardStream(pairs), num_workers=0, batch_size=2)
        assert len([warning for warning in caught if "takes its place" in str(warning.message)]) == 1
        assert pairs.num_replaced == 3
        assert [len(batch["text_id"]) for batch in batches] == [2, 2, 2]
        assert {0, 2, 3} == set(ids(batches)), "the others are read from the same stream"
        for batch in batches:
            numbers = (255 * batch["image"][:, 0, 0, 0]).round().int().tolist()
            assert batch["text"] == [f"number {number}" for number in numbers]

    def test_nothing_readable(self, tmp_path):
        write_tar(tmp_path / "0.tar", [member for n in range(4) for member in img2dataset_sample(n, image=b"no image")])
        with pytest.warns(UserWarning, match="does not open"), pytest.raises(RuntimeError, match="None of the 4 pairs"):
            streamed(ShardStream(ShardDataset(tmp_path, max_unreadable=1)), num_workers=0)
