import numpy as np
import pytest
import torch
from PIL import Image

from lightning_itm import ImageTextDataset
from lightning_itm.checks import check_at_least, check_choice, check_tokens


def test_a_choice_passes():
    check_choice("reduction", "sum", ("mean", "sum"))


def test_the_error_names_value_and_choices():
    with pytest.raises(ValueError, match=r"Expected `reduction` to be one of 'mean', 'sum', got 'max'\."):
        check_choice("reduction", "max", ("mean", "sum"))


def test_counts():
    check_at_least(1, texts_per_image=1, every_n_epochs=None)
    with pytest.raises(ValueError, match="Expected `rank_min` to be at least 0, got -1"):
        check_at_least(0, start_epoch=0, rank_min=-1)


@pytest.mark.parametrize(
    "tokens", [torch.ones(1, 3), np.ones((1, 3)), ["a text"], [torch.ones(3)], [{"ids": torch.ones(3)}]]
)
def test_what_a_tokenizer_may_return(tokens):
    assert type(check_tokens(tokens)) is type(tokens[0])
    assert np.array_equal(np.asarray(check_tokens(tokens)), np.asarray(tokens[0]))


@pytest.mark.parametrize(
    ("tokens", "got"),
    [
        ([[1, 2]], "list of list"),
        ([object()], "list of object"),
        ({"input_ids": [[1]]}, "dict of list"),
        (None, "NoneType"),
        ([], "list"),
    ],
)
def test_what_it_may_not_return(tokens, got):
    """Each text is one row of a batch. Lists of ids would be stacked into columns."""
    pairs = ImageTextDataset([Image.new("RGB", (8, 8))], ["a"], tokenizer=lambda texts: tokens)
    with pytest.raises(
        TypeError,
        match=rf"`tokenizer` to return a tensor \(1, length\) .* or a dict of these, got {got}\. For one of transformers",
    ):
        pairs[0]


def test_a_dict_of_tensors_is_cut_into_rows():
    row = check_tokens({"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[1, 0]])})
    assert {key: value.tolist() for key, value in row.items()} == {"input_ids": [1, 2], "attention_mask": [1, 0]}


def test_a_dict_of_several_rows_is_refused():
    with pytest.raises(ValueError, match=r"one row for a list of one text, got the shapes \{'input_ids': \(2, 3\)\}"):
        check_tokens({"input_ids": torch.ones(2, 3)})
