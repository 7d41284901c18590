import pickle
from pathlib import Path

import torch

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
