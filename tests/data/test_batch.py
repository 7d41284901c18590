import pytest
import torch

from lightning_itm import ImageTextDataset
from lightning_itm.data import PaddedSequence, check_batch, collate_pairs
from tests.helpers.pictures import captions, cut_outs
from tests.helpers.tiny import AUGMENTED, tiny_pairs


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

    def test_texts_that_are_dicts_are_stacked_by_their_keys(self):
        samples = [
            {"text": {"input_ids": torch.full((3,), i), "attention_mask": torch.ones(3)}, "text_id": i}
            for i in range(2)
        ]
        batch = collate_pairs(samples)
        assert batch["text"]["input_ids"].tolist() == [[0, 0, 0], [1, 1, 1]]
        assert batch["text"]["attention_mask"].shape == (2, 3)
        samples[1]["text"]["input_ids"] = torch.ones(4)
        with pytest.raises(
            ValueError, match=r"every input_ids .* one shape, got \[\(3,\), \(4,\)\]\. .* pads to a fixed length"
        ):
            collate_pairs(samples)

    def test_texts_stay_strings_without_a_tokenizer(self):
        pairs = ImageTextDataset(cut_outs(2), captions(2), transform=AUGMENTED)
        assert collate_pairs([pairs[0], pairs[1]])["text"] == ["cut-out number 0", "the 0th square"]


class TestCheckBatch:
    def test_names_what_is_missing(self):
        with pytest.raises(ValueError, match=r"\['image_id', 'text_id'\] missing, got \['image', 'text'\]"):
            check_batch({"image": torch.zeros(2, 3), "text": ["a", "b"]})

    def test_what_is_no_mapping(self):
        with pytest.raises(
            TypeError, match=r"to be a dict with the keys .*, got list. Let the dataset return such dicts"
        ):
            check_batch([torch.zeros(2, 3), ["a", "b"]])


class TestPaddedSequence:
    def test_pads_with_zeros_after_the_end(self):
        padded = PaddedSequence.pad([torch.ones(1, 2), torch.ones(3, 2)])
        assert padded.values[:, :, 0].tolist() == [[1, 0, 0], [1, 1, 1]]
        assert padded.lengths.tolist() == [1, 3]

    @pytest.mark.parametrize(
        ("lengths", "message"),
        [
            ([1], r"one length for each of the 2 sequences, got the shape \(1,\)"),
            ([0, 3], "from 1 to 3, the padded one, got 0 to 3"),
            ([1, 4], "from 1 to 3, the padded one, got 1 to 4"),
        ],
    )
    def test_lengths_that_do_not_fit(self, lengths, message):
        with pytest.raises(ValueError, match=message):
            PaddedSequence(torch.zeros(2, 3), torch.tensor(lengths))
