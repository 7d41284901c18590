import pickle
import random
import tracemalloc

import numpy as np
import pytest
import torch

from lightning_itm import RegionFeatureDataset
from lightning_itm.data import PaddedSequence, Vocabulary, collate_pairs
from lightning_itm.data.region_features import SPECIAL, FeatureRows
from lightning_itm.data.resumable_loader import SeededDataset

TEXTS = ["a dog runs", "a dog sleeps", "two cats", "a cat, a dog"]


class TestVocabulary:
    def test_numbers_frequent_words(self):
        vocabulary = Vocabulary.build(TEXTS, min_count=2)
        assert vocabulary.words == [*SPECIAL, "a", "dog"]
        assert vocabulary.encode("A dog, two cats!") == [1, 5, 6, 3, 3, 3, 3, 2]

    def test_saves_and_loads(self, tmp_path):
        vocabulary = Vocabulary.build(TEXTS, min_count=1)
        vocabulary.save(tmp_path / "words.json")
        assert Vocabulary.load(tmp_path / "words.json").words == vocabulary.words

    def test_changes_a_fifth_of_the_words_as_published(self):
        vocabulary = Vocabulary.build([" ".join(f"w{i}" for i in range(50))], min_count=1)
        random.seed(0)
        text = " ".join(["w7"] * 20_000)
        ids = vocabulary.encode(text, 0.2)[1:-1]
        kept, masked = ids.count(vocabulary.id_of["w7"]), ids.count(SPECIAL.index("<mask>"))
        replaced = len(ids) - kept - masked
        assert kept / 20_000 == pytest.approx(0.8, abs=0.01)
        assert masked / 20_000 == pytest.approx(0.1, abs=0.01)
        assert replaced / 20_000 == pytest.approx(0.02, abs=0.005)
        assert (20_000 - len(ids)) / 20_000 == pytest.approx(0.08, abs=0.01)

    def test_other_special_words(self):
        with pytest.raises(ValueError, match="Expected the words to start with"):
            Vocabulary(["dog"])


class TestRegionPairs:
    def make(self, num_images=6, **kwargs):
        features = np.random.default_rng(0).standard_normal((num_images, 5, 3)).astype(np.float16)
        return features, RegionFeatureDataset(
            features, [[f"text {i}", f"other {i}"] for i in range(num_images)], **kwargs
        )

    def test_evaluation_has_all_regions_and_words(self):
        features, pairs = self.make(lengths=[5, 4, 3, 2, 1, 5], vocabulary=Vocabulary([*SPECIAL, "text"]))
        sample = pairs.evaluation()[2]
        assert torch.equal(sample["image"].values, torch.from_numpy(features[1, :4].astype(np.float32)))
        assert sample["text"].values.tolist() == [1, 5, 3, 2]
        assert (sample["image_id"], sample["text_id"]) == (1, 2)

    def test_training_drops_regions_but_never_all(self):
        _, pairs = self.make(drop_regions=0.9)
        random.seed(0)
        numbers = [len(pairs.load_image(0).values) for _ in range(300)]
        assert min(numbers) == 1
        assert 1 < sum(numbers) / 300 < 2
        _, pairs = self.make(drop_regions=0.2)
        assert sum(len(pairs.load_image(0).values) for _ in range(2000)) / 2000 == pytest.approx(0.8 * 5 + 0.2, abs=0.1)

    def test_batches_are_padded(self):
        _, pairs = self.make(lengths=[5, 4, 3, 2, 1, 5])
        batch = collate_pairs([pairs.evaluation()[i] for i in (0, 9)])
        assert isinstance(batch["image"], PaddedSequence)
        assert batch["image"].lengths.tolist() == [5, 1]
        assert (batch["image"].values[1, 1:] == 0).all()
        assert batch["image_id"].tolist() == [0, 4]

    def test_draws_are_a_function_of_seed_epoch_and_pair(self):
        _, pairs = self.make(drop_regions=0.5)
        seeded = SeededDataset(pairs, seed=3)
        drawn = [[len(seeded[i]["image"].values) for i in order] for order in (range(12), reversed(range(12)))]
        assert drawn[0] == drawn[1][::-1]
        seeded.epoch.fill_(1)
        assert drawn[0] != [len(seeded[i]["image"].values) for i in range(12)]


class TestFiles:
    def write(self, folder, num_images=8, repeats=1, captions=5, split="train"):
        features = np.random.default_rng(0).standard_normal((num_images, 4, 3)).astype(np.float16)
        np.save(folder / f"{split}_ims.npy", features.repeat(repeats, axis=0))
        lines = [f"image {i} caption {place}" for i in range(num_images) for place in range(captions)]
        (folder / f"{split}_caps.txt").write_text("\n".join(lines) + "\n")
        return features

    @pytest.mark.parametrize("repeats", [1, 5])
    def test_scan_layout(self, repeats, tmp_path):
        features = self.write(tmp_path, repeats=repeats)
        pairs = RegionFeatureDataset.from_scan(tmp_path)
        assert (len(pairs.images), len(pairs.texts)) == (8, 40)
        text_id = 4 * 5 + 3
        assert pairs.texts[text_id] == "image 4 caption 3"
        assert pairs.text_image_id[text_id] == 4
        regions = pairs.evaluation().load_image(4).values
        assert torch.equal(regions, torch.from_numpy(features[4].astype(np.float32)))

    def test_one_caption_an_image(self, tmp_path):
        self.write(tmp_path, num_images=10, captions=1)
        pairs = RegionFeatureDataset.from_scan(tmp_path)
        assert (len(pairs.images), len(pairs.texts)) == (10, 10)

    def test_signs_within_a_caption_end_no_line(self, tmp_path):
        self.write(tmp_path, num_images=2)
        lines = ["a\u2028b", "a\x85b", "a\x0cb", *(f"c{i}" for i in range(7))]
        (tmp_path / "train_caps.txt").write_text("\r\n".join(lines) + "\r\n\r\n", encoding="utf-8-sig", newline="")
        assert RegionFeatureDataset.from_scan(tmp_path).texts == lines

    def test_numbers_that_do_not_match(self, tmp_path):
        self.write(tmp_path, captions=4)
        with pytest.raises(
            ValueError, match=r"5 captions an image, got 8 rows in train_ims.npy and 32 lines in train_caps.txt"
        ):
            RegionFeatureDataset.from_scan(tmp_path)
        assert len(RegionFeatureDataset.from_scan(tmp_path, captions_per_image=4)) == 32

    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"dev_ims.npy, found none. Is `folder`"):
            RegionFeatureDataset.from_scan(tmp_path, "dev")

    def test_a_file_is_mapped_and_not_loaded(self, tmp_path):
        """Neither by the pairs nor by what a worker that is spawned gets."""
        shape = (300, 36, 2048)
        array = np.lib.format.open_memmap(tmp_path / "train_ims.npy", mode="w+", dtype=np.float16, shape=shape)
        array[7] = 1.5
        array.flush()
        tracemalloc.start()
        pairs = RegionFeatureDataset(tmp_path / "train_ims.npy", [f"text {i}" for i in range(300)])
        sent = pickle.dumps(pairs)
        again = pickle.loads(sent)
        assert float(again.evaluation().load_image(7).values.mean()) == 1.5
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4e6 < array.nbytes / 10
        assert len(sent) < 1e5

    def test_rows_at_steps(self, tmp_path):
        np.save(tmp_path / "a.npy", np.arange(12))
        rows = FeatureRows(tmp_path / "a.npy").every(2).every(3)
        assert [int(rows[i]) for i in range(len(rows))] == [0, 6]


class TestBadInput:
    @pytest.mark.parametrize(
        ("shape", "texts", "options", "message"),
        [
            ((3, 4), 3, {}, r"shape \(images, regions, dim\), got \(3, 4\)"),
            ((3, 4, 2), 2, {}, "one text, or one list of texts, for each of the 3 images, got 2"),
            ((3, 4, 2), 3, {"lengths": [4, 0, 1]}, "lengths from 1 to 4, the regions of a row, got 0 to 4"),
            ((3, 4, 2), 3, {"lengths": [4, 5, 1]}, "lengths from 1 to 4, the regions of a row, got 1 to 5"),
            ((3, 4, 2), 3, {"lengths": [4]}, "one length for each of the 3 images, got 1"),
            ((3, 4, 2), 3, {"drop_regions": 1.0}, r"`drop_regions` to be in \[0, 1\), got 1.0"),
        ],
    )
    def test_wrong_arguments(self, shape, texts, options, message):
        with pytest.raises(ValueError, match=message):
            RegionFeatureDataset(np.zeros(shape, dtype=np.float32), [f"text {i}" for i in range(texts)], **options)

    def test_features_of_another_kind(self):
        with pytest.raises(TypeError, match=r"an array or the path of a .npy file, got list. Use `numpy.asarray`"):
            RegionFeatureDataset([[1.0]], ["a"])

    def test_an_empty_caption_is_replaced_and_counted(self):
        pairs = RegionFeatureDataset(np.zeros((2, 4, 2), dtype=np.float32), ["", "a text"])
        with pytest.warns(UserWarning, match="Text 0, of image 0, is empty"):
            sample = pairs[0]
        assert (sample["image_id"], sample["text_id"]) == (1, 1)


@pytest.mark.parametrize(("option", "keys"), [("exclude", {"caption_id"}), ("keep", set())])
@pytest.mark.filterwarnings("ignore:2 of 3 pairs share their caption")
def test_equal_captions(option, keys):
    features = np.zeros((3, 2, 4), dtype=np.float32)
    pairs = RegionFeatureDataset(features, ["a dog", "two cats", "A dog"], equal_captions=option)
    assert pairs[2].keys() - {"image", "text", "image_id", "text_id"} == keys
    assert [pairs[index].get("caption_id", 0) for index in range(3)] == ([0, 1, 0] if keys else [0, 0, 0])
