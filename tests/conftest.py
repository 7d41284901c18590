import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a fork after OpenMP has started its threads hangs

import atexit
import gc
import logging
import shutil
import tempfile

import pytest
import torch
from hypothesis import settings

# A compilation that broke off leaves a broken file in the cache: every run, and each of its processes, has a cache of its own.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor-")
atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more would be processes that import torch first

torch.set_num_threads(1)
# The first backward pass starts a thread for each device that is known by then. After an ONNX export, PyTorch knows several,
# and a process with such threads can't be forked.
torch.ones((), requires_grad=True).backward()
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
# The same cases at every run, and no verdict by the clock: the machines that run this are shared.
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def pytest_collection_finish():
    """Leave what is imported by now out of the garbage collector's rounds, which copy its pages in each forked process."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
