import pickle
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_itm.shared_integers import SharedIntegers


def small():
    return SharedIntegers(((3, 2), (4,)))


def test_is_one_memory_for_a_process_that_unpickles_it():
    """A spawned worker gets it by pickle, and sees what is written later."""
    integers = small()
    copy = pickle.loads(pickle.dumps(integers))
    copy.is_pending = True
    assert integers.is_pending
    first, second = torch.arange(6).view(3, 2), torch.arange(4)
    integers.copy_(first, second)
    assert torch.equal(copy.tensors[0], first.int())
    assert torch.equal(copy.tensors[1], second.int())
    assert not copy.is_pending


class Waits(Dataset):
    def __init__(self, integers):
        self.integers = integers

    def __len__(self):
        return 1

    def __getitem__(self, index):
        self.integers.wait()
        return int(self.integers.tensors[1][0])


class Impatient(SharedIntegers):
    patience = 0.5


def waiting():
    integers = Impatient(((3, 2), (4,)))
    integers.is_pending = True
    return integers, iter(DataLoader(Waits(integers), 1, num_workers=1))


class TestWait:
    def test_has_an_end_where_the_main_process_does_something_else(self):
        """Such as a callback that reads a batch too early, which would wait for the worker, and the worker for it."""
        _, batches = waiting()
        with pytest.raises(RuntimeError, match=r"with entries within 0 s: nothing was published.*`LearningRateFinder`"):
            next(batches)

    def test_lasts_as_long_as_the_main_process_is_at_work(self):
        integers, batches = waiting()
        integers.announce()
        time.sleep(1.5)
        integers.copy_(torch.ones(3, 2), torch.full((4,), 7))
        assert next(batches).item() == 7

    def test_not_in_the_main_process(self):
        integers, _ = waiting()
        with pytest.raises(RuntimeError, match="nothing was published before the first batch"):
            integers.wait()


def test_file_goes_with_it():
    integers = small()
    path = integers.path
    assert Path(path).exists()
    del integers
    assert not Path(path).exists()


def test_entries_outlast_the_file():
    integers = small()
    integers.copy_(torch.ones(3, 2), torch.ones(4))
    integers.remove()
    assert not Path(integers.path).exists()
    assert (integers.tensors[0] == 1).all()
