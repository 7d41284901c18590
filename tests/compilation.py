"""What a test needs that runs ``torch.compile`` with its default backend, which calls a C++ compiler."""

import functools
import os
import shutil

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed


def compiles(test):
    """Skip ``test`` where no C++ compiler works; start it once more, from an empty cache, if a compilation fails."""

    @pytest.mark.xdist_group("compiles")  # in one process, where the second finds in the cache what the first compiled
    @functools.wraps(test)
    def with_compiler(*args, **kwargs):
        if not compiler_works():
            pytest.skip("no C++ compiler works here, which torch.compile needs")
        again_from_empty_cache(test, *args, **kwargs)

    return with_compiler


def again_from_empty_cache(function, *args, **kwargs):
    torch._dynamo.reset()
    try:
        return function(*args, **kwargs)
    except BackendCompilerFailed as error:
        print(f"once more, from an empty cache, after: {error}")
    torch._dynamo.reset()
    shutil.rmtree(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    return function(*args, **kwargs)


@functools.cache
def compiler_works():
    try:
        again_from_empty_cache(lambda: torch.compile(lambda x: x.sin() + 1)(torch.ones(8)))
    except BackendCompilerFailed:
        return False
    return True
