import pytest

from lightning_itm.checks import check_choice


def test_a_choice_passes():
    check_choice("reduction", "sum", ("mean", "sum"))


def test_the_error_names_value_and_choices():
    with pytest.raises(ValueError, match=r"Expected `reduction` to be one of 'mean', 'sum', got 'max'\."):
        check_choice("reduction", "max", ("mean", "sum"))
