"""A disk that is nearly full: a limit for the size of files, or a small one in memory, where a process may mount it."""

import resource
import shlex
import subprocess
import sys
from contextlib import contextmanager

import pytest


def on_a_small_disk(folder, size, command):
    """Return a command that runs another one in a mount namespace of its own, in which ``folder`` is such a disk."""
    mount = f"mount -t tmpfs -o size={size} tmpfs {shlex.quote(str(folder))} && {shlex.join(command)}"
    return ["unshare", "-m", "bash", "-c", mount]


@contextmanager
def files_below(size):
    """Let no file grow beyond a size in bytes, which ends a write as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _can_mount():
    if not sys.platform.startswith("linux"):
        return False
    try:
        ended = subprocess.run(on_a_small_disk("/mnt", "64k", ["true"]), check=False, capture_output=True)
    except FileNotFoundError:
        return False
    return ended.returncode == 0


SMALL_DISK = pytest.mark.skipif(not _can_mount(), reason="needs the right to mount a disk")
