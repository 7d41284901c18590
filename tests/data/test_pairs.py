import io

import pytest
import torch

from lightning_itm import ImageTextDataset
from lightning_itm.mining.negative_table import fingerprint
from tests.helpers.pictures import cut_outs
from tests.helpers.tiny import NUM_IMAGES, PLAIN, tiny_pairs, tokenize


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_series_is_read_by_position():
    """As pandas has it: iterated in one order, indexed by labels of another."""

    class Series(list):
        def __getitem__(self, label):
            return super().__getitem__(len() - 1 - label)

    images = cut_outs(3)
    pairs = ImageTextDataset(Series(images), Series("abc"))
    assert torch.equal(pairs[0]["image"], ImageTextDataset(images, list("abc"))[0]["image"])
    assert pairs[0]["text"] == "a"


class Column:
    """Decodes on access, as a column of a Hugging Face data set. One picture is broken."""

    def __init__(self, num_images, broken=None):
        self.images, self.broken, self.asked = cut_outs(num_images), broken, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.asked.append(index)
        if index == self.broken:
            raise SyntaxError("broken PNG file")
        return self.images[index]


class TestLazyImages:
    def test_are_decoded_one_by_one(self):
        column = Column(30)
        pairs = ImageTextDataset(column, [f"text {i}" for i in range(30)])
        assert len(column.asked) <= 1, "the first at most, to see what it is"
        listed = ImageTextDataset(column.images, [f"text {i}" for i in range(30)])
        assert torch.equal(pairs[17]["image"], listed[17]["image"])
        assert set(column.asked) <= {0, 17}

    @pytest.mark.parametrize("broken", [0, 3])
    def test_one_that_does_not_open_is_unreadable(self, broken):
        pairs = ImageTextDataset(Column(5, broken), list("abcde"), max_unreadable=0.2)
        with pytest.warns(UserWarning, match=f"Image {broken} of Column does not open: broken PNG file. Another pair"):
            assert pairs[broken]["image_id"] != broken
        with pytest.raises(RuntimeError, match="In evaluation nothing is replaced"):
            pairs.evaluation()[broken]

    def test_paths_in_another_sequence_are_looked_for(self, tmp_path):
        class Paths(Column):
            def __init__(self):
                self.images, self.broken, self.asked = [tmp_path / f"{i}.png" for i in range(3)], None, []

            def __iter__(self):
                return iter(self.images)

        with pytest.raises(FileNotFoundError, match="found no file for 3"):
            ImageTextDataset(Paths(), list("abc"))


def test_index_out_of_range():
    with pytest.raises(IndexError, match="below 2, the number of pairs, got 2"):
        ImageTextDataset(cut_outs(2), ["a", "b"])[2]


class TestBroken:
    """A pair that can't be read: replaced and counted in training, an error in evaluation."""

    def images(self):
        good = cut_outs(4)
        return [good[0], png(good[1])[:200], b"no image", good[3]]

    def test_another_pair_takes_its_place(self):
        pairs = ImageTextDataset(self.images(), ["a", "b", "c", "d"], max_unreadable=0.5)
        with pytest.warns(
            UserWarning, match=r"Image 1: bytes does not open: .* counted in `ImageTextDataset.num_replaced`"
        ):
            sample = pairs[1]
        assert (sample["text"], sample["image_id"]) in [("a", 0), ("d", 3)]
        assert torch.equal(sample["image"], pairs[sample["text_id"]]["image"])
        assert {pairs[2]["text"] for _ in range(30)} == {"a", "d"}, "and is not reported again"
        assert pairs.num_replaced == 2, "each pair once"

    def test_too_many_are_an_error(self):
        pairs = ImageTextDataset(self.images(), ["a", "b", "c", "d"], max_unreadable=0.25)
        with (
            pytest.raises(RuntimeError, match=r"Image 2: bytes does not open"),
            pytest.warns(UserWarning, match="Image 1"),
        ):
            [pairs[index] for index in range(4)]

    @pytest.mark.parametrize("text", ["", "  \n"])
    def test_empty_caption(self, text):
        pairs = ImageTextDataset(cut_outs(3), [["a", text], ["b"], ["c"]], max_unreadable=0.5)
        with pytest.warns(UserWarning, match="Text 1, of image 0, is empty"):
            assert pairs[1]["text"] in ("a", "b", "c")

    def test_evaluation_replaces_nothing(self):
        pairs = ImageTextDataset(self.images(), ["a", "b", "c", "d"]).evaluation()
        with pytest.raises(RuntimeError, match=r"Image 2: bytes does not open.*Repair the pair, or leave"):
            pairs[2]

    def test_missing_file_names_its_path(self, tmp_path):
        cut_outs(1)[0].save(tmp_path / "gone.png")
        pairs = ImageTextDataset([tmp_path / "gone.png"], ["a"])
        (tmp_path / "gone.png").unlink()
        with pytest.raises(RuntimeError, match=r"gone.png does not open"):
            pairs.evaluation()[0]

    @pytest.mark.filterwarnings("ignore:Image 0")
    def test_nothing_can_be_read(self):
        with pytest.raises(RuntimeError, match="None of the 2 pairs can be read"):
            ImageTextDataset([b"x", b"y"], ["a", "b"], max_unreadable=1)[0]


def test_evaluation_has_no_augmentation():
    view = tiny_pairs().evaluation()
    assert torch.equal(view[2]["image"], view[2]["image"])
    assert torch.equal(view[2]["image"], PLAIN(cut_outs(NUM_IMAGES)[1]))


def test_half_a_surrogate_pair_ends_no_run():
    """As texts from the web have it. Tokenizers encode texts in UTF-8, which has no halves."""
    texts = ["a \ud83d dog", "a cat"]
    pairs = ImageTextDataset(cut_outs(2), texts, tokenizer=tokenize)
    assert torch.equal(pairs[0]["text"], tokenize(["a ? dog"])[0])
    other = ImageTextDataset(cut_outs(2), ["a ? dog", "a cat"], tokenizer=tokenize)
    assert fingerprint(pairs) != fingerprint(other), "which is in the checkpoint of mined negatives"


def test_tokenizer_is_called_with_a_list():
    assert torch.equal(tiny_pairs()[0]["text"], tokenize(["cut-out number 0"])[0])


class TestEqualCaptions:
    TEXTS = (["A mug", "the first"], ["a  MUG"], ["a cup", "the first"])

    def test_pairs_carry_the_number_of_their_caption(self):
        with pytest.warns(UserWarning, match=r"4 of 5 pairs share their caption with another image") as record:
            pairs = ImageTextDataset(cut_outs(3), self.TEXTS)
        assert record[0].filename == __file__, "the line that made the set"
        assert [pairs[index]["caption_id"] for index in range(5)] == [0, 1, 0, 2, 1]
        assert [pairs.evaluation()[index]["caption_id"] for index in range(5)] == [0, 1, 0, 2, 1]

    @pytest.mark.parametrize(
        ("texts", "option"),
        [
            ([["a mug", "a mug"], ["a cup"]], "exclude"),  # repeated on one image only
            ([["a mug", ""], ["a cup", " "]], "exclude"),  # an empty one is never read
            ([["a mug"], ["a mug"]], "keep"),
        ],
    )
    def test_no_numbers_where_there_is_nothing_to_exclude(self, texts, option, recwarn):
        pairs = ImageTextDataset(cut_outs(2), texts, equal_captions=option)
        assert pairs.caption_id is None
        assert "caption_id" not in pairs[0]
        assert len(recwarn) == 0

    def test_an_unknown_option(self):
        with pytest.raises(ValueError, match="`equal_captions` to be one of 'exclude', 'keep', got 'drop'"):
            ImageTextDataset(cut_outs(1), ["a mug"], equal_captions="drop")
