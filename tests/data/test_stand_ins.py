"""A set of which most is broken, in runs: what stands in, in a resumed run, too, and when it is too much."""

from collections import Counter

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_itm import ImageTextDataModule, ImageTextDataset, ShardDataset, ShardStream
from tests.helpers.pictures import captions, cut_outs
from tests.helpers.resume import Watch
from tests.helpers.shards import TRANSFORMS, img2dataset_sample, write_tar
from tests.helpers.tiny import AUGMENTED, SILENT, Tiny, tokenize

NUM_IMAGES = 40

pytestmark = pytest.mark.filterwarnings("ignore:Image .* does not open")


def is_broken(image_id):
    return 5 <= image_id < 35


def from_images(folder, max_unreadable=1.0):
    images = [b"no image" if is_broken(i) else image for i, image in enumerate(cut_outs(NUM_IMAGES))]
    return ImageTextDataset(
        images, captions(NUM_IMAGES), transform=AUGMENTED, tokenizer=tokenize, max_unreadable=max_unreadable
    )


def from_stream(folder, max_unreadable=1.0):
    if not folder.exists():
        folder.mkdir()
        for shard in range(4):
            ids = range(10 * shard, 10 * shard + 10)
            write_tar(
                folder / f"{shard}.tar",
                [member for i in ids for member in img2dataset_sample(i, image=b"no image" if is_broken(i) else None)],
            )
    return ShardStream(
        ShardDataset(
            folder, **{**TRANSFORMS, "transform": TRANSFORMS["eval_transform"]}, max_unreadable=max_unreadable
        ),
        shuffle_buffer=7,
    )


def fit(dataset, *, num_workers, folder=".", resume_from=None):
    watch = Watch()
    save = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=3)
    trainer = L.Trainer(**{**SILENT, "enable_checkpointing": True}, max_epochs=2, callbacks=[watch, save])
    data = ImageTextDataModule(dataset, batch_size=8, num_workers=num_workers, seed=3)
    trainer.fit(Tiny(), datamodule=data, ckpt_path=resume_from, weights_only=True if resume_from else None)
    return watch.seen


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("make", [from_images, from_stream])
class TestRuns:
    @pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
    def test_a_resumed_run_sees_the_same_stand_ins(self, make, num_workers, tmp_path):
        whole = fit(make(tmp_path / "data"), num_workers=num_workers, folder=tmp_path)
        rest = fit(
            make(tmp_path / "data"), num_workers=num_workers, folder=tmp_path, resume_from=tmp_path / "step=3.ckpt"
        )
        assert rest == whole[3:]

    def test_no_pair_fills_whole_batches(self, make, num_workers, tmp_path):
        dataset = make(tmp_path / "data")
        seen = fit(dataset, num_workers=num_workers)
        pairs = getattr(dataset, "pairs", dataset)
        assert not any(is_broken(int(pairs.text_image_id[text_id])) for _, _, ids, *_ in seen for text_id in ids)
        # One of ten or twenty good pairs took all places of a batch before.
        assert all(max(Counter(ids).values()) <= 5 for _, _, ids, *_ in seen)
        assert pairs.num_replaced == sum(is_broken(image_id) for image_id in pairs.text_image_id.tolist())

    def test_too_much_ends_the_run(self, make, num_workers, tmp_path):
        with pytest.raises(RuntimeError, match=r"at most 5\.0% of the [48]0 pairs to be unreadable"):
            fit(make(tmp_path / "data", 0.05), num_workers=num_workers)
