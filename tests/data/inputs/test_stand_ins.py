import random

import pytest

from lightning_itm.data.inputs.stand_ins import BLOCK, with_drawn_stand_ins
from lightning_itm.unreadable import UnreadablePairError


def read(num, is_broken, num_skipped=0):
    """Return what stands at each place, and what was reported."""
    errors = []

    def load(wanted, loaded):
        if is_broken(loaded):
            raise UnreadablePairError(f"pair {loaded} is broken")
        return wanted, loaded

    found = with_drawn_stand_ins(
        range(num),
        load,
        what="pairs",
        report=lambda error, key: errors.append(key),
        draw=lambda key: random.Random(key).randrange,
        num_skipped=num_skipped,
    )
    return list(found), errors


def first_block(key):
    return key < BLOCK


def last_block(key):
    return key >= 3 * BLOCK


def every_fifth(key):
    return key % 5 == 0


def four_of_five(key):
    return key % 5 > 0


@pytest.mark.parametrize("is_broken", [every_fifth, four_of_five, first_block, last_block])
@pytest.mark.parametrize("num", [3 * BLOCK + 1, 4 * BLOCK])
class TestWithDrawnStandIns:
    def test_every_place_comes_once_in_order(self, num, is_broken):
        found, errors = read(num, is_broken)
        assert [wanted for wanted, _ in found] == list(range(num))
        assert all(loaded == wanted for wanted, loaded in found if not is_broken(wanted))
        assert not any(is_broken(loaded) for _, loaded in found)
        assert set(errors) == {key for key in range(num) if is_broken(key)}

    @pytest.mark.parametrize("done", [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 7, 3 * BLOCK, 3 * BLOCK + 1])
    def test_a_resumed_run_draws_the_same(self, num, is_broken, done):
        assert read(num, is_broken, num_skipped=done)[0] == read(num, is_broken)[0][done:]

    def test_no_pair_stands_in_for_many(self, num, is_broken):
        stand_ins = [loaded for wanted, loaded in read(num, is_broken)[0] if is_broken(wanted)]
        assert max(stand_ins.count(loaded) for loaded in set(stand_ins)) < 20


@pytest.mark.parametrize("num", [1, 4, BLOCK, BLOCK + 3])
def test_nothing_can_be_read(num):
    with pytest.raises(UnreadablePairError, match=f"None of the {num} pairs can be read. The first: pair 0 is broken"):
        read(num, lambda key: True)


def test_nothing_to_read():
    assert read(0, first_block) == ([], [])
