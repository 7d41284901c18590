"""Sets that are joined, or split by image: ids are dense, and each pair stays together."""

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader

from lightning_itm import (
    ImageTextDataModule,
    ImageTextDataset,
    OfflineHardNegativeMining,
    QuintupletLoss,
    ShardDataset,
    write_shards,
)
from lightning_itm.data.evaluation_items import evaluation_view
from lightning_itm.identity import set_difference
from tests.helpers.fit import fit
from tests.helpers.tiny import SILENT, Tiny, tiny_pairs


def numbered(numbers, texts_per_image=2, **kwargs):
    """Pictures that say their number, as their texts do."""
    images = [Image.new("RGB", (4, 4), (number, 0, 0)) for number in numbers]
    return ImageTextDataset(images, [[f"number {n}"] * texts_per_image for n in numbers], **kwargs)


def read(pairs):
    """Check ids and pairing, and return the number of each image."""
    found = {}
    for text_id in range(len(pairs)):
        sample = pairs[text_id]
        number = round(255 * float(sample["image"][0, 0, 0]))
        assert sample["text"] == f"number {number}" == pairs.texts[text_id]
        assert sample["text_id"] == text_id
        assert sample["image_id"] == int(pairs.text_image_id[text_id])
        assert found.setdefault(sample["image_id"], number) == number
    assert sorted(found) == list(range(len(pairs.images)))
    return [found[image_id] for image_id in sorted(found)]


class TestJoined:
    def test_ids_do_not_collide(self):
        one, other = numbered(range(3)), numbered(range(10, 15), texts_per_image=3)
        for joined in (ImageTextDataset.concatenate(one, other), one + other):
            assert read(joined) == [0, 1, 2, 10, 11, 12, 13, 14]
            assert list(joined.texts) == [*one.texts, *other.texts]
        assert read(one + other + numbered([99])) == [0, 1, 2, 10, 11, 12, 13, 14, 99]

    def test_each_keeps_its_transforms(self):
        one = numbered([1], transform=lambda image: torch.full((3, 1, 1), 1 / 255), eval_transform=lambda image: "one")
        joined = one + numbered([2], eval_transform=lambda image: "two")
        assert read(joined) == [1, 2]
        view = joined.evaluation()
        assert [view[text_id]["image"] for text_id in range(4)] == ["one", "one", "two", "two"]
        assert not joined.is_evaluation

    def test_shards_and_pictures(self, tmp_path):
        write_shards(numbered(range(5)), tmp_path / "shards", images_per_shard=2)
        assert read(ShardDataset(tmp_path / "shards") + numbered([77])) == [0, 1, 2, 3, 4, 77]

    def test_equal_captions_of_both(self):
        red, blue = (Image.new("RGB", (4, 4), color) for color in ("red", "blue"))
        with pytest.warns(UserWarning, match="2 of 4 pairs share their caption"):
            joined = ImageTextDataset([red, red], ["a mug", "a cup"]) + ImageTextDataset(
                [blue, blue], ["A Mug", "a dog"]
            )
        assert joined.caption_id.tolist() == [0, 1, 0, 2]
        kept = ImageTextDataset([blue], ["A mug"], equal_captions="keep")
        assert (kept + kept).caption_id is None
        with pytest.raises(ValueError, match=r"same `equal_captions`, got 'exclude' and 'keep'"):
            ImageTextDataset([red], ["a mug"]) + kept

    def test_nothing_is_decoded(self):
        class Lazy:
            decoded = 0

            def __len__(self):
                return 6

            def __getitem__(self, number):
                Lazy.decoded += 1
                return Image.new("RGB", (4, 4), (number, 0, 0))

        one, other = ImageTextDataset(Lazy(), [f"number {n}" for n in range(6)]).split(0.5)
        before = Lazy.decoded
        joined = one + other + numbered([9], texts_per_image=1)
        assert Lazy.decoded == before
        assert sorted(read(joined)) == [0, 1, 2, 3, 4, 5, 9]

    def test_a_path_in_both_is_an_error(self, tmp_path):
        Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
        one = ImageTextDataset([tmp_path / "a.png"], ["a"])
        with pytest.raises(ValueError, match=r"every image once, got .*a.png as image 0 and image 1"):
            one + ImageTextDataset([tmp_path / "a.png"], ["b"])

    def test_other_things_are_refused(self):
        others = [1, 2]
        with pytest.raises(TypeError, match="Expected ImageTextDatasets, got list"):
            tiny_pairs() + others
        with pytest.raises(ValueError, match="at least one set to read, got none"):
            ImageTextDataset.concatenate()

    def test_are_another_set_in_another_order(self):
        one, other = numbered(range(3)), numbered(range(10, 15))
        assert set_difference((one + other).identity(), (other + one).identity()) == "another order of texts"
        assert set_difference((one + other).identity(), (one + other).identity()) is None

    @pytest.mark.parametrize("workers", [0, 1])
    def test_are_mined(self, workers):
        joined = tiny_pairs(12, equal_captions="keep") + tiny_pairs(12, equal_captions="keep")
        data = ImageTextDataModule(joined, joined, batch_size=4, num_workers=workers)
        miner = OfflineHardNegativeMining(texts_per_image=8, images_per_text=4)
        fit(Tiny(QuintupletLoss()), data, miner, max_epochs=1)
        assert miner.table.texts.shape == (24, 8)
        assert (joined.text_image_id[miner.table.texts.long()] != torch.arange(24)[:, None]).all()


class TestSplit:
    @given(st.integers(2, 40), st.floats(0.05, 0.95), st.integers(0, 5))
    def test_by_image(self, num_images, fraction, seed):
        pairs = numbered(range(num_images))
        num_first = round(fraction * num_images)
        if not 0 < num_first < num_images:
            with pytest.raises(ValueError, match=r"Expected `fraction` to leave images in both parts"):
                pairs.split(fraction, seed)
            return
        first, rest = (read(part) for part in pairs.split(fraction, seed))
        assert len(first) == num_first
        assert sorted(first + rest) == list(range(num_images))
        assert [read(part) for part in pairs.split(fraction, seed)] == [first, rest]

    def test_another_seed_is_another_split(self):
        pairs = numbered(range(40))
        assert read(pairs.split(0.5, 0)[0]) != read(pairs.split(0.5, 1)[0])

    def test_parts_join_to_the_whole(self):
        first, rest = numbered(range(9)).split(0.5)
        assert sorted(read(first + rest)) == list(range(9))

    def test_trains_and_validates(self):
        train, val = tiny_pairs().split(0.7, seed=1)
        run = fit(Tiny, ImageTextDataModule(train, val, batch_size=4, num_workers=1), max_epochs=1)
        assert 0 < run.metrics["val/rsum"] <= 600


def test_a_concatdataset_of_one_is_evaluated_like_it():
    pairs = numbered([1], eval_transform=lambda image: "evaluation")
    assert evaluation_view(ConcatDataset([pairs]))[0]["image"] == "evaluation"


class TestIdsThatComeTwice:
    @pytest.mark.parametrize("kind", [ConcatDataset, list])
    def test_are_refused_before_a_loader_is_made(self, kind):
        joined, before = kind([tiny_pairs(), tiny_pairs()]), DataLoader.__init__
        for data in (
            ImageTextDataModule(joined, num_workers=0),
            ImageTextDataModule(tiny_pairs(), joined, num_workers=0),
        ):
            with pytest.raises(
                MisconfigurationException, match=r"ids come twice. Join them with `ImageTextDataset.conc"
            ):
                L.Trainer(max_epochs=1, **SILENT).fit(Tiny(), datamodule=data)
        with pytest.raises(MisconfigurationException, match="`val_dataset` to be one set"):
            L.Trainer(**SILENT).validate(Tiny(), datamodule=data)
        assert DataLoader.__init__ is before
