import random

import pytest
from torch.utils.data import DataLoader, Dataset

from lightning_itm.unreadable import (
    PairMarks,
    UnreadablePairError,
    UnreadablePairs,
    load_or_other,
    others,
    with_stand_ins,
)

BROKEN = {1, 2, 5}
NUM_THINGS = 6


def load(index):
    if index in BROKEN:
        raise UnreadablePairError(f"thing {index} is broken")
    return f"thing {index}"


class TestWithStandIns:
    def test_every_key_comes_once_and_the_last_stands_in_at_the_end(self):
        attempts = ((index, lambda index=index: load(index)) for index in range(NUM_THINGS))
        assert list(with_stand_ins(attempts, what="things")) == [
            ("thing 0", 0, True),
            ("thing 3", 3, True),
            ("thing 3", 1, False),
            ("thing 3", 2, False),
            ("thing 4", 4, True),
            ("thing 4", 5, False),
        ]

    def test_nothing_can_be_read(self):
        with pytest.raises(
            UnreadablePairError, match=r"None of the 2 things can be read. The first: thing 2 is broken"
        ):
            list(with_stand_ins([(2, lambda: load(2)), (5, lambda: load(5))], what="things"))

    def test_no_attempts_are_no_error(self):
        assert list(with_stand_ins([], what="things")) == []


class TestLoadOrOther:
    def test_what_can_be_read_is_itself_and_nothing_is_drawn(self):
        before = random.getstate()
        assert load_or_other(load, 3, NUM_THINGS, what="things") == ("thing 3", True)
        assert load_or_other(load, -3, NUM_THINGS, what="things") == ("thing 3", True)
        assert random.getstate() == before

    def test_all_that_can_be_read_stand_in(self):
        """About equally often, so that no pair fills whole batches, even where a whole block is lost."""
        draw = random.Random(0).randrange
        found = [load_or_other(self.last_twenty, 7, 101, what="things", draw=draw) for _ in range(2000)]
        assert not any(is_own for _, is_own in found)
        counts = [found.count((index, False)) for index in range(81, 101)]
        assert sum(counts) == 2000
        assert 50 < min(counts) <= max(counts) < 200

    def test_each_error_comes_once_with_its_index(self):
        errors = []
        with pytest.raises(
            UnreadablePairError, match=r"None of the 6 things can be read. The first: thing 4 is broken"
        ):
            load_or_other(
                self.broken, 4, 6, what="things", report=lambda error, index: errors.append((str(error), index))
            )
        assert sorted(errors) == [(f"thing {index} is broken", index) for index in range(6)]

    @staticmethod
    def last_twenty(index):
        if index < 81:
            raise UnreadablePairError(f"thing {index} is broken")
        return index

    @staticmethod
    def broken(index):
        raise UnreadablePairError(f"thing {index} is broken")


@pytest.mark.parametrize("num", [1, 2, 3, 12, 30, 31])
def test_others_are_all_others_once(num):
    draw = random.Random(num).randrange
    for index in [*range(num), None]:
        assert sorted(others(index, num, draw)) == [other for other in range(num) if other != index]


class Reports(Dataset):
    """Whose workers report pairs: each pair is read twice, and two of three are broken."""

    def __init__(self, unreadable):
        self.unreadable = unreadable

    def __len__(self):
        return 60

    def __getitem__(self, index):
        if index % 3:
            self.unreadable.report(UnreadablePairError(f"pair {index % 30} is broken"), index % 30)
        return index


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_marks_are_shared_by_all_workers(context):
    marks = PairMarks(100)
    list(DataLoader(Marks(marks), num_workers=2, multiprocessing_context=context))
    assert len(marks) == 40
    assert marks.first(3) == [0, 1, 2]
    assert marks.first(100) == list(range(40))


class Marks(Dataset):
    def __init__(self, marks):
        self.marks = marks

    def __len__(self):
        return 80

    def __getitem__(self, index):
        return self.marks.add(index // 2 if index < 40 else index - 40)


class TestUnreadablePairs:
    @pytest.mark.parametrize("num_workers", [0, 2])
    @pytest.mark.filterwarnings("ignore:pair")
    def test_too_many_end_the_run_from_any_worker(self, num_workers):
        # The share is of pairs, so that it does not matter how often a pair is met.
        enough, too_few = UnreadablePairs(30, 2 / 3), UnreadablePairs(30, 0.6)
        list(DataLoader(Reports(enough), num_workers=num_workers))
        assert len(enough) == 20
        # One worker may count the last pair before another one has said that they are too many.
        message = r"at most 60\.0% of the 30 pairs .*got (19|20), the pairs 1, 2, 4, 5, 7 among"
        with pytest.raises(RuntimeError, match=message):
            list(DataLoader(Reports(too_few), num_workers=num_workers))

    def test_the_first_is_a_warning_and_the_others_are_counted(self):
        unreadable = UnreadablePairs(100, 0.05)
        with pytest.warns(UserWarning, match=r"pair 7 is broken\. Another pair takes its place"):
            unreadable.report(UnreadablePairError("pair 7 is broken"), 7)
        for index in (7, 8, 9, 10, 11):
            unreadable.report(UnreadablePairError(f"pair {index} is broken"), index)
        assert len(unreadable) == 5
        with pytest.raises(RuntimeError, match=r"got 6, .*pair 50 is broken\. Repair them, leave them out, or give a"):
            unreadable.report(UnreadablePairError("pair 50 is broken"), 50)

    @pytest.mark.parametrize("fraction", [-0.1, 1.5])
    def test_no_fraction(self, fraction):
        with pytest.raises(ValueError, match="`max_unreadable` to be from 0 to 1"):
            UnreadablePairs(10, fraction)
