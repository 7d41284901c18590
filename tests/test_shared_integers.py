import errno
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_itm.shared_integers import SharedIntegers
from tests.helpers.no_room import SMALL_DISK, files_below, on_a_small_disk


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


class TestSweep:
    """Files of killed processes go when the next object is made."""

    KILLED = (
        "import os, signal; from lightning_itm.shared_integers import SharedIntegers; table = SharedIntegers(((8,),)); "
    )

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr(tempfile, "tempdir", None)  # read anew from the environment

    def run(self, code):
        return subprocess.run([sys.executable, "-c", self.KILLED + code], check=False, capture_output=True, text=True)

    def test_what_a_killed_process_left(self, tmp_path):
        assert self.run("os.kill(os.getpid(), signal.SIGKILL)").returncode == -signal.SIGKILL
        (left,) = tmp_path.iterdir()
        integers = small()
        assert not left.exists()
        assert [path.name for path in tmp_path.iterdir()] == [Path(integers.path).name]

    def test_not_what_a_running_process_or_its_workers_have(self, tmp_path):
        mine = small()
        assert "True" in self.run(f"print(os.path.exists({mine.path!r}))").stdout
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        try:
            os.close(mine._finalizer.peek()[2][1])  # as when this process is killed and its worker is not
            small()
            assert Path(mine.path).exists()
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        mine._finalizer.detach()
        small()
        assert not Path(mine.path).exists()

    def test_not_the_files_of_others(self, tmp_path):
        others = [tmp_path / name for name in ("lightning-itm-0000-x", "lightning-itm-abc", "else")]
        for path in others:
            path.touch()
        small()
        assert sorted(tmp_path.iterdir()) == sorted(others)


TOO_LARGE = """
import os
from lightning_itm.shared_integers import SharedIntegers
try:
    SharedIntegers(((100_000,),))
except OSError as error:
    print(error.errno, error, os.listdir(os.environ["TMPDIR"]))
"""


class TestNoRoom:
    """An error that says so, and not a signal at the first write."""

    def test_a_limit_of_the_size_of_files(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        message = f"Expected room for a SharedIntegers of 0.4 MB in {tmp_path}, got: .*TMPDIR"
        with pytest.raises(OSError, match=message) as caught, files_below(1 << 16):
            SharedIntegers(((100_000,),))
        assert caught.value.errno == errno.EFBIG
        assert list(tmp_path.iterdir()) == []

    @SMALL_DISK
    @pytest.mark.slow
    def test_a_full_disk(self, tmp_path):
        command = on_a_small_disk(tmp_path, "64k", [sys.executable, "-c", TOO_LARGE])
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        ended = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr  # -7, SIGBUS, before
        assert ended.stdout.startswith(f"{errno.ENOSPC} ")
        assert ended.stdout.endswith("[]\n")
