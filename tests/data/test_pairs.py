import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_itm import ImageTextDataset
from lightning_itm.data import collate_pairs
from lightning_itm.data.resumable_loader import SeededDataset
from tests.helpers.pictures import captions, cut_outs
from tests.helpers.tiny import AUGMENTED, PLAIN, tiny_pairs, tokenize


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    for number, image in enumerate(cut_outs(20)):
        path = tmp_path / "val2014" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
    return tmp_path


class TestImages:
    def test_every_form_of_an_image_is_the_same_image(self, tmp_path):
        image = cut_outs(1)[0]
        image.save(tmp_path / "a.png")
        image.save(tmp_path / "b.png")
        forms = [image, np.asarray(image), png(image), tmp_path / "a.png", str(tmp_path / "b.png")]
        pairs = ImageTextDataset(forms, ["a cut-out"] * 5)
        assert all(torch.equal(pairs[i]["image"], pairs[0]["image"]) for i in range(5))
        assert pairs[0]["image"].shape == (3, 24, 24)

    @pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (5, 4, 3), (5, 4, 4)])
    def test_arrays_with_any_number_of_channels(self, shape):
        assert ImageTextDataset([np.full(shape, 255, np.uint8)], ["white"])[0]["image"].eq(1).all()

    def test_transparent_is_white(self):
        image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
        assert ImageTextDataset([image], ["nothing"])[0]["image"].eq(1).all()

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            (3.5, "got float for image 1"),
            (np.zeros((4, 4, 3)), r"got float64 \(4, 4, 3\) for image 1"),
            (np.zeros((3, 8, 8), np.uint8), r"got uint8 \(3, 8, 8\) for image 1"),
        ],
    )
    def test_what_is_no_image(self, image, message):
        with pytest.raises(TypeError, match=message):
            ImageTextDataset([cut_outs(1)[0], image], ["a", "b"])

    def test_one_path_a_caption_would_make_captions_negatives_of_each_other(self):
        with pytest.raises(ValueError, match=r"got a.png as image 0 and image 2: .*`from_csv` groups rows"):
            ImageTextDataset(["a.png", "b.png", "a.png"], ["one", "two", "three"])

    def test_a_series_is_read_by_position(self):
        """As pandas has it: iterated in one order, indexed by labels of another."""

        class Series(list):
            def __getitem__(self, label):
                return super().__getitem__(len(self) - 1 - label)

        images = cut_outs(3)
        pairs = ImageTextDataset(Series(images), Series("abc"))
        assert torch.equal(pairs[0]["image"], ImageTextDataset(images, list("abc"))[0]["image"])
        assert pairs[0]["text"] == "a"


class TestTexts:
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

    def test_index_out_of_range(self):
        with pytest.raises(IndexError, match="below 2, the number of pairs, got 2"):
            ImageTextDataset(cut_outs(2), ["a", "b"])[2]


class TestBroken:
    """A pair that can't be read: replaced and counted in training, an error in evaluation."""

    def images(self):
        good = cut_outs(4)
        return [good[0], png(good[1])[:200], b"no image", good[3]]

    def test_the_next_pair_takes_its_place(self):
        pairs = ImageTextDataset(self.images(), ["a", "b", "c", "d"])
        with pytest.warns(
            UserWarning, match=r"Image 1: bytes does not open: .* counted in `ImageTextDataset.num_replaced`"
        ):
            sample = pairs[1]
        assert (sample["text"], sample["image_id"], sample["text_id"]) == ("d", 3, 3)
        assert torch.equal(sample["image"], pairs[3]["image"])
        assert pairs[2]["text"] == "d", "and is not reported again"
        assert pairs.num_replaced == 3  # 1, then 2 in its place; then 2

    @pytest.mark.parametrize("text", ["", "  \n"])
    def test_empty_caption(self, text):
        pairs = ImageTextDataset(cut_outs(3), [["a", text], ["b"], ["c"]])
        with pytest.warns(UserWarning, match="Text 1, of image 0, is empty"):
            assert pairs[1]["text"] == "b"

    def test_evaluation_replaces_nothing(self):
        pairs = ImageTextDataset(self.images(), ["a", "b", "c", "d"]).evaluation()
        with pytest.raises(RuntimeError, match=r"Image 2: bytes does not open.*Repair the pair, or leave"):
            pairs[2]

    def test_missing_file_names_its_path(self, tmp_path):
        pairs = ImageTextDataset([tmp_path / "gone.png"], ["a"])
        with pytest.raises(RuntimeError, match=r"gone.png does not open"):
            pairs.evaluation()[0]

    @pytest.mark.filterwarnings("ignore:Image 0")
    def test_nothing_can_be_read(self):
        with pytest.raises(RuntimeError, match="None of the 2 pairs can be read"):
            ImageTextDataset([b"x", b"y"], ["a", "b"])[0]


class TestAugmentation:
    def test_is_a_function_of_seed_epoch_and_pair(self):
        pairs = SeededDataset(tiny_pairs())
        first = pairs[2]["image"]
        assert torch.equal(first, SeededDataset(tiny_pairs())[2]["image"])
        assert not torch.equal(first, SeededDataset(tiny_pairs(), seed=1)[2]["image"])
        pairs.epoch.fill_(1)
        assert not torch.equal(first, pairs[2]["image"])

    def test_evaluation_has_none(self):
        view = tiny_pairs().evaluation()
        assert torch.equal(view[2]["image"], view[2]["image"])
        assert torch.equal(view[2]["image"], PLAIN(cut_outs(23)[1]))


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
            for number in range(20)
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
        expected = ImageTextDataset([cut_outs(20)[numbers[1]]], ["x"])
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


class TestCollate:
    def test_makes_the_contract(self):
        pairs = tiny_pairs()
        batch = collate_pairs([pairs[i] for i in range(3)])
        assert batch["image"].shape == (3, 3, 16, 16)
        assert batch["text"].shape == (3, 24)
        assert batch["image_id"].tolist() == [0, 0, 1]
        assert batch["image_id"].dtype == batch["text_id"].dtype == torch.int64

    def test_images_of_two_sizes(self):
        pairs = ImageTextDataset([*cut_outs(1), *cut_outs(1, size=30)], ["a", "b"])
        with pytest.raises(ValueError, match=r"every image of a batch to have one shape, got .*Give .* a `transform`"):
            collate_pairs([pairs[0], pairs[1]])

    def test_texts_stay_strings_without_a_tokenizer(self):
        pairs = ImageTextDataset(cut_outs(2), captions(2), transform=AUGMENTED)
        assert collate_pairs([pairs[0], pairs[1]])["text"] == ["cut-out number 0", "the 0th square"]


def test_tokenizer_is_called_with_a_list():
    assert torch.equal(tiny_pairs()[0]["text"], tokenize(["cut-out number 0"])[0])
