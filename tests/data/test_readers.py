import json

import pytest
import torch

from lightning_itm import ImageTextDataset
from tests.helpers.pictures import cut_outs

NUM_FILES = 20


@pytest.fixture
def folder(tmp_path):
    for number, image in enumerate(cut_outs(NUM_FILES)):
        path = tmp_path / "val2014" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
    return tmp_path


class TestFlattenTexts:
    def test_lists_and_flat_ids_are_the_same(self):
        images = cut_outs(3)
        nested = ImageTextDataset(images, [["a"], ["b", "c"], ["d"]])
        flat = ImageTextDataset(images, ["a", "b", "c", "d"], text_image_id=[0, 1, 1, 2])
        for pairs in (nested, flat):
            assert [(pairs[i]["text"], pairs[i]["image_id"], pairs[i]["text_id"]) for i in range(len(pairs))] == [
                ("a", 0, 0),
                ("b", 1, 1),
                ("c", 1, 2),
                ("d", 2, 3),
            ]

    @pytest.mark.parametrize(
        ("images", "texts", "ids", "message"),
        [
            (0, [], None, "at least one image, got none"),
            (2, ["a"], None, "each of the 2 images, got 1"),
            (3, [["a"], [], []], None, r"an empty list for image 1 \(2 of 3\)"),
            (2, ["a", "b"], [0], "each of the 2 texts, got 1"),
            (2, ["a", "b"], [0, 2], "every number from 0 to 1, .* Got 2 numbers from 0 to 2"),
            (3, ["a", "b"], [0, 2], "dense: every number from 0 to 2"),
            (2, ["a", "b"], [1, 2], "Got 2 numbers from 1 to 2"),
        ],
    )
    def test_that_do_not_fit(self, images, texts, ids, message):
        with pytest.raises(ValueError, match=message):
            ImageTextDataset(cut_outs(images) if images else [], texts, text_image_id=ids)

    @pytest.mark.parametrize("text", [None, float("nan"), 3])
    def test_that_are_no_strings(self, text):
        for texts in (["a", text], [["a"], [text]]):
            with pytest.raises(TypeError, match=f"every text to be a string, got {text} for text 1"):
                ImageTextDataset(cut_outs(2), texts)


class TestFiles:
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
    def test_karpathy(self, folder, split, numbers):
        pairs = ImageTextDataset.from_karpathy(self.karpathy(folder), folder, split)
        assert len(pairs) == 5 * len(numbers)
        assert [pairs[5 * place]["text"] for place in range(len(numbers))] == [f"sentence {n}-0" for n in numbers]
        expected = ImageTextDataset([cut_outs(NUM_FILES)[numbers[1]]], ["x"])
        assert torch.equal(pairs[7]["image"], expected[0]["image"])
        assert pairs[7]["image_id"] == 1

    def test_karpathy_split_that_is_not_there(self, folder):
        with pytest.raises(ValueError, match=r"one of \['restval', 'test', 'train', 'val'\].* got 'dev'"):
            ImageTextDataset.from_karpathy(self.karpathy(folder), folder, "dev")

    def test_wrong_image_root(self, folder):
        with pytest.raises(FileNotFoundError, match=r"Is `image_root` .*nowhere right"):
            ImageTextDataset.from_karpathy(self.karpathy(folder), folder / "nowhere")

    def test_csv_rows_with_one_image_share_it(self, folder):
        (folder / "a.csv").write_text(
            '\ufeffimage,text\n0.png,"one, and"\n1.png,two\n0.png,three\n'
        )  # as Excel saves it
        pairs = ImageTextDataset.from_csv(folder / "a.csv", folder / "val2014")
        assert [(pairs[i]["text"], pairs[i]["image_id"]) for i in range(3)] == [
            ("one, and", 0),
            ("three", 0),
            ("two", 1),
        ]

    def test_tsv_as_open_clip_reads_it(self, folder):
        (folder / "a.tsv").write_text("filepath\ttitle\n0.png\tone\n")
        columns = {"image_column": "filepath", "text_column": "title", "delimiter": "\t"}
        assert ImageTextDataset.from_csv(folder / "a.tsv", folder / "val2014", **columns)[0]["text"] == "one"

    def test_jsonl_with_a_text_or_several(self, folder):
        lines = [{"image": "0.png", "text": "one"}, {"image": "1.png", "text": ["two", "three"]}]
        (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        pairs = ImageTextDataset.from_jsonl(folder / "a.jsonl", folder / "val2014")
        assert pairs.texts == ["one", "two", "three"]

    def test_missing_column(self, folder):
        (folder / "a.csv").write_text("file,caption\n0.png,one\n")
        with pytest.raises(
            ValueError, match=r"row 1 of .*a.csv to have 'image' and 'text', got the columns \['file', "
        ):
            ImageTextDataset.from_csv(folder / "a.csv", folder)

    def test_empty_table(self, folder):
        (folder / "a.csv").write_text("image,text\n")
        with pytest.raises(ValueError, match="at least one image, got none"):
            ImageTextDataset.from_csv(folder / "a.csv", folder)
