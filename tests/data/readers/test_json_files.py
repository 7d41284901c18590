"""The JSON files in which captions are published, told apart by what they hold."""

import json

import pytest
import torch

from lightning_itm import ImageTextDataset
from lightning_itm.data import read_pairs
from tests.data.readers.conftest import NUM_FILES
from tests.helpers.pictures import cut_outs


def write(folder, content):
    path = folder / "val2014" / "a.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


class TestKarpathy:
    def karpathy(self, folder):
        splits = ["train", "restval", "val", "test"]
        entries = [
            {
                "filepath": "val2014",
                "filename": f"{number}.png",
                "split": splits[number % 4],
                "imgid": number,
                "sentences": [{"raw": f"sentence {number}-{place}", "tokens": []} for place in range(5)],
            }
            for number in range(NUM_FILES)
        ]
        (folder / "dataset.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))
        return folder / "dataset.json"

    @pytest.mark.parametrize(
        ("split", "numbers"),
        [
            ("train", [0, 1, 4, 5, 8, 9, 12, 13, 16, 17]),
            (["train"], [0, 4, 8, 12, 16]),
            ("val", [2, 6, 10, 14, 18]),
            ("test", [3, 7, 11, 15, 19]),
        ],
    )
    def test_splits(self, folder, split, numbers):
        pairs = ImageTextDataset.from_karpathy(self.karpathy(folder), folder, split)
        assert len(pairs) == 5 * len(numbers)
        assert [pairs[5 * place]["text"] for place in range(len(numbers))] == [f"sentence {n}-0" for n in numbers]
        expected = ImageTextDataset([cut_outs(NUM_FILES)[numbers[1]]], ["x"])
        assert torch.equal(pairs[7]["image"], expected[0]["image"])
        assert pairs[7]["image_id"] == 1

    def test_a_split_that_is_not_there(self, folder):
        with pytest.raises(ValueError, match=r"one of \['restval', 'test', 'train', 'val'\].* got 'dev'"):
            ImageTextDataset.from_karpathy(self.karpathy(folder), folder, "dev")

    def test_wrong_image_root(self, folder):
        with pytest.raises(FileNotFoundError, match=r"Is `image_root` .*nowhere right"):
            ImageTextDataset.from_karpathy(self.karpathy(folder), folder / "nowhere")

    def test_sentences_without_a_text(self, folder):
        sentences = [{"tokens": ["a", "dog"]}, {"raw": None}, {"raw": "a cat"}, {"raw": ""}]
        path = write(folder, {"images": [{"filename": "0.png", "split": "train", "sentences": sentences}]})
        with pytest.warns(UserWarning, match="3 times, first in entry 1 of 'images': {'tokens'"):
            assert read_pairs(path).texts == ["a cat"]

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            (
                {"filename": "0.png", "sentences": []},
                "entry 1 of 'images' in .* 'filename', 'split', 'sentences', got {",
            ),
            ({"filename": "0.png", "split": "train", "sentences": []}, r"found none; .* in entry 1 of 'images': \[\]"),
            ({"filename": 0, "split": "train", "sentences": []}, "the image in entry 1 of 'images' .*, got 0"),
            ({"filename": "0.png", "split": 3, "sentences": []}, r"`split` to be one of \[\]"),
        ],
    )
    def test_entries_with_a_slip(self, folder, entry, message):
        with pytest.raises(ValueError, match=message):
            read_pairs(write(folder, {"images": [entry]}))

    def test_another_form(self, folder):
        with pytest.raises(ValueError, match=r"got \[\{.*\}\]\. `read_pairs` reads all three"):
            ImageTextDataset.from_karpathy(write(folder, [{"image": "0.png", "caption": "a"}]), folder)


class TestLists:
    """``[{"image": ..., "caption": ...}, ...]``, as BLIP and ALBEF have, with a string or with several."""

    def test_captions(self, folder):
        rows = [
            {"image": "0.png", "caption": "a dog", "image_id": "img_0"},
            {"image": "1.png", "caption": ["a cat", "a tree"]},
            {"image": "0.png", "caption": "the dog"},
        ]
        pairs = read_pairs(write(folder, rows))
        assert (pairs.texts, pairs.text_image_id.tolist()) == (["a dog", "the dog", "a cat", "a tree"], [0, 0, 1, 1])

    def test_keys_by_name(self, folder):
        path = write(folder, [{"file": "0.png", "title": "a dog", "caption": "another"}])
        assert read_pairs(path, image_column="file", text_column="title").texts == ["a dog"]
        with pytest.raises(ValueError, match=r"entry 1 of .* with 'image' and 'other', got the columns \['file', "):
            read_pairs(path, text_column="other")


class TestCoco:
    def coco(self, **changes):
        images = [{"id": 9, "file_name": "0.png"}, {"id": 4, "file_name": "1.png"}]
        captions = [(9, "a dog"), (4, "a cat"), (9, "the dog")]
        annotations = [{"id": 7, "image_id": image_id, "caption": text} for image_id, text in captions]
        return {"info": {}, "images": images, "annotations": annotations, **changes}

    def test_captions(self, folder):
        pairs = read_pairs(write(folder, self.coco()))
        assert [image.name for image in pairs.images] == ["0.png", "1.png"]
        assert (pairs.texts, pairs.text_image_id.tolist()) == (["a dog", "the dog", "a cat"], [0, 0, 1])

    def test_an_image_without_an_annotation(self, folder):
        path = write(
            folder, self.coco(annotations=[{"image_id": 4, "caption": "a cat"}, {"image_id": 4, "caption": 3}])
        )
        with pytest.warns(UserWarning, match=r"2 times, first in image 9, which has no annotation: \[\]\. So 1 of 2"):
            assert read_pairs(path).texts == ["a cat"]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"annotations": [{"image_id": 5, "caption": "a"}]},
                "'image_id' of annotation 1 .* one of 'images', got 5",
            ),
            ({"annotations": [{"image_id": [9], "caption": "a"}]}, r"one of 'images', got \[9\]"),
            ({"annotations": [{"image_id": 9}]}, r"entry 1 of 'annotations' in .* to have 'image_id', 'caption', got"),
            ({"images": [{"id": 9, "file_name": "0.png"}] * 2}, "to be a number that comes once, got 9 in entry 2"),
            ({"images": 3}, "to be Karpathy's, COCO's .*, or a list of objects, got the keys"),
        ],
    )
    def test_entries_with_a_slip(self, folder, changes, message):
        with pytest.raises(ValueError, match=message):
            read_pairs(write(folder, self.coco(**changes)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "a.json to be JSON, got: Expecting property name"),
        ("3", "or a list of objects, got 3"),
        ('{"0.png": ["a dog"]}', r"or a list of objects, got the keys \['0\.png'\]"),
        ("[3]", "entry 1 of .*a.json to be an object with 'image' and 'text', got 3"),
        ("[]", "at least one image with a caption"),
    ],
)
def test_no_form_at_all(folder, content, message):
    with pytest.raises(ValueError, match=message):
        read_pairs(write(folder, content))
