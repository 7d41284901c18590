"""What tells one set from another, and that each state which refers to its ids is compared with it."""

import subprocess
import sys

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch.utils.data import Subset

from lightning_itm import (
    FalseNegativeElimination,
    ImageTextDataModule,
    ImageTextDataset,
    InfoNCELoss,
    OfflineHardNegativeMining,
    QuintupletLoss,
    RegionFeatureDataset,
    ShardDataset,
    write_shards,
)
from lightning_itm.identity import identity_of, set_difference, set_identity
from tests.helpers.fit import fit
from tests.helpers.pictures import captions, cut_outs
from tests.helpers.tiny import AUGMENTED, NUM_IMAGES, PLAIN, Tiny, tiny_data, tiny_pairs, tokenize


def write_pictures(folder, names):
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / name)
    return [folder / name for name in names]


def named(paths, texts=("one", "two", "three")):
    return ImageTextDataset(paths, list(texts))


class TestASet:
    def test_may_be_moved(self, tmp_path):
        names = ["a.png", "b.png", "c.png"]
        one, other = (named(write_pictures(tmp_path / folder, names)) for folder in ("here", "there/deep"))
        assert one.identity() == other.identity()
        assert one.evaluation().identity() == one.identity()
        assert named([str(path) for path in one.images]).identity() == one.identity()

    @pytest.mark.parametrize(
        ("names", "texts", "difference"),
        [
            ("abcd", ("one", "two", "three", "four"), "4 pairs instead of 3"),
            ("abc", ("one", "two", "four"), "other texts"),
            ("abc", ("one", "three", "two"), "another order of texts"),
            ("abd", ("one", "two", "three"), "other images"),
            ("acb", ("one", "two", "three"), "another order of images"),
            ("abc", ("one", "two", "three"), None),
        ],
    )
    def test_that_differs(self, names, texts, difference, tmp_path):
        then = named(write_pictures(tmp_path / "then", ["a.png", "b.png", "c.png"]))
        now = named(write_pictures(tmp_path / "now", [f"{name}.png" for name in names]), texts)
        assert set_difference(then.identity(), now.identity()) == difference

    def test_with_texts_of_other_images(self):
        one, other = (set_identity(["a", "b", "c"], torch.tensor(owner), 2) for owner in ([0, 0, 1], [0, 1, 1]))
        assert set_difference(one, other) == "texts that belong to other images"
        assert set_difference({}, other) is None, "of an older checkpoint, nothing is known"

    def test_is_the_same_in_another_process(self):
        program = (
            "import torch; from lightning_itm.identity import set_identity;"
            "print(set_identity(['a', 'ü \\ud800'], torch.tensor([0, 0]), 1, image_names=['a/b']))"
        )
        answers = [subprocess.run([sys.executable, "-c", program], capture_output=True, check=True) for _ in range(2)]
        assert answers[0].stdout == answers[1].stdout != b""

    def test_in_shards_differs_by_keys_and_sizes(self, tmp_path):
        for name, number in (("one", 8), ("same", 8), ("more", 9)):
            write_shards(tiny_pairs(number), tmp_path / name, images_per_shard=3)
        one, same, more = (ShardDataset(tmp_path / name).identity() for name in ("one", "same", "more"))
        assert one == same
        assert set_difference(one, more) == "18 pairs instead of 16"
        assert set_difference(one, tiny_pairs(8).identity()) is None, "the same texts, read in another form"
        other = ImageTextDataset(cut_outs(9)[1:], captions(8))
        write_shards(other, tmp_path / "other", images_per_shard=3)
        assert set_difference(one, ShardDataset(tmp_path / "other").identity()) == "images of other sizes"

    def test_that_is_a_part_or_of_an_unknown_kind(self):
        pairs = tiny_pairs()
        halves = [identity_of(Subset(pairs, range(start, 46, 2))) for start in (0, 1)]
        assert set_difference(*halves) == "another part of the set"
        assert identity_of([1, 2, 3]) == {"pairs": 3}
        assert identity_of(None) == {}

    def test_of_region_features(self):
        features = torch.randn(3, 2, 4).numpy()
        one, other = (RegionFeatureDataset(features, texts) for texts in (["a", "b", "c"], ["a", "c", "b"]))
        assert set_difference(one.identity(), other.identity()) == "another order of texts"


def reversed_pairs():
    kwargs = {"transform": AUGMENTED, "eval_transform": PLAIN, "tokenizer": tokenize}
    return ImageTextDataset(cut_outs(NUM_IMAGES)[::-1], captions(NUM_IMAGES)[::-1], **kwargs)


def data_of(pairs, **kwargs):
    return ImageTextDataModule(pairs, **{"batch_size": 4, "num_workers": 0, "seed": 5, **kwargs})


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
class TestAResume:
    def stopped(self, path, *callbacks, loss=None, max_steps=5):
        fit(Tiny(loss), data_of(tiny_pairs()), *callbacks, max_steps=max_steps).trainer.save_checkpoint(path)
        return path

    @pytest.mark.parametrize(
        ("pairs", "options", "message"),
        [
            (lambda: tiny_pairs(NUM_IMAGES + 1), {}, "got 48 pairs instead of 46"),
            (reversed_pairs, {}, "got another order of texts"),
            (tiny_pairs, {"seed": 6}, "`seed` 5, as when the run stopped after batch 5 of epoch 0, got 6"),
        ],
    )
    def test_in_the_middle_of_an_epoch_needs_the_same_set(self, pairs, options, message, tmp_path):
        checkpoint = self.stopped(tmp_path / "a.ckpt")
        with pytest.raises(MisconfigurationException, match=message):
            fit(Tiny, data_of(pairs(), **options), resume_from=checkpoint)

    def test_at_the_end_of_an_epoch_may_have_another(self, tmp_path):
        checkpoint = self.stopped(tmp_path / "a.ckpt", max_steps=11)
        assert fit(Tiny, data_of(reversed_pairs(), seed=6), resume_from=checkpoint).trainer.global_step == 22

    def test_with_mined_negatives_needs_the_same_set(self, tmp_path):
        miner = OfflineHardNegativeMining(texts_per_image=8, images_per_text=4)
        checkpoint = self.stopped(tmp_path / "a.ckpt", miner, loss=QuintupletLoss(), max_steps=11)
        miner = OfflineHardNegativeMining(texts_per_image=8, images_per_text=4)
        with pytest.raises(ValueError, match=r"got those of another: it has another order of texts"):
            fit(Tiny(QuintupletLoss()), data_of(reversed_pairs()), miner, resume_from=checkpoint)

    def test_with_a_memory_bank_needs_the_same_set(self, tmp_path):
        checkpoint = self.stopped(tmp_path / "a.ckpt", FalseNegativeElimination(16), loss=InfoNCELoss(), max_steps=11)
        with pytest.raises(ValueError, match=r"got that of another: it has another order of texts"):
            fit(Tiny(InfoNCELoss()), data_of(reversed_pairs()), FalseNegativeElimination(16), resume_from=checkpoint)

    def test_of_an_older_checkpoint_is_not_compared(self, tmp_path):
        checkpoint = torch.load(self.stopped(tmp_path / "a.ckpt"), weights_only=True)
        del checkpoint["ImageTextDataModule"]["set"], checkpoint["ImageTextDataModule"]["seed"]
        torch.save(checkpoint, tmp_path / "older.ckpt")
        assert fit(Tiny, data_of(tiny_pairs(), seed=6), resume_from=tmp_path / "older.ckpt").trainer.global_step == 22


def test_a_set_that_is_mined_or_streamed_is_told_by_its_pairs():
    data = tiny_data()
    seen = []

    class Keep(OfflineHardNegativeMining):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            seen.append(data.state_dict()["set"])

    fit(Tiny(QuintupletLoss()), data, Keep(texts_per_image=8, images_per_text=4), max_epochs=1)
    assert seen == [tiny_pairs().identity()]
