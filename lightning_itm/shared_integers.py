"""Integers in a file that all processes map, so that workers which already run see a change."""

import errno
import multiprocessing
import os
import platform
import tempfile
import time
import weakref
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

try:
    import fcntl
except ModuleNotFoundError:  # Windows, where a file that is open can't be deleted, and so needs no lock
    fcntl = None  # type: ignore[assignment]

import torch
from torch import Tensor

_READY, _PENDING, _AT_WORK, _GIVEN_UP = range(4)
_WAY_OUT = (
    "Perhaps a callback reads a batch before `OfflineHardNegativeMining` has mined. Put it after the mining in the list of "
    "callbacks. Lightning puts `LearningRateFinder` and `BatchSizeFinder` first: use these and the Tuner in a run without "
    "mining, and then fit with it."
)


class SharedIntegers:
    """Hold int32 tensors in a file that all processes map.

    A worker that is already running sees new entries at once. It got this object by fork or by pickle, and maps the same file.
    The file lies in the folder for temporary files, and goes with this object. What a killed process left there is deleted
    when the next object is made.

    Args:
        shapes: The shape of each tensor, such as ``[(100, 8), (500, 4)]``.

    Raises:
        OSError: if there is no room for the file.
    """

    missing: ClassVar[str] = "nothing was published before the first batch"
    """What the error says where the main process asks too early."""
    patience: ClassVar[float] = 300.0
    """Seconds that a worker waits for a main process that is not at work on the entries."""

    def __init__(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        self.shapes = shapes
        sweep(tempfile.gettempdir())
        # A file and not `share_memory_()`: /dev/shm is small in containers.
        handle, self.path = _locked_file()
        self._finalizer = weakref.finalize(self, _remove, self.path, handle, os.getpid())
        size = 4 * (1 + sum(torch.Size(shape).numel() for shape in shapes))
        try:
            reserve(handle, size)  # else a write to the mapped file would end the process with SIGBUS
        except OSError as error:
            self._finalizer()
            raise OSError(
                error.errno,
                f"Expected room for a {type(self).__name__} of {size / 1e6:.1f} MB in {os.path.dirname(self.path)}, got: "
                f"{error.strerror}. Make room there, or set the environment variable TMPDIR to a folder that has it.",
            ) from error
        self._map()

    @property
    def is_pending(self) -> bool:
        """True while the first entries are still to come. A worker that needs them has to wait."""
        return bool(self._pending)

    @is_pending.setter
    def is_pending(self, value: bool) -> None:
        self._pending.fill_(_PENDING if value else _READY)

    def announce(self) -> None:
        """Say that the main process is at work on the first entries, so that workers wait for as long as it takes."""
        if self.is_pending:
            self._pending.fill_(_AT_WORK)

    def remove(self) -> None:
        """Delete the file, in the process that made it. Processes that have mapped it keep its content, and wait no longer."""
        self._give_up()
        self._finalizer()

    def require(self) -> None:
        """Raise if the first entries are still to come, in the process that makes them: to wait would be for ever.

        Raises:
            RuntimeError: if there are no entries.
        """
        if self.is_pending:
            self._give_up()
            raise RuntimeError(f"Expected a {type(self).__name__} with entries: {self.missing}. {_WAY_OUT}")

    def wait(self) -> None:
        """Wait for the first entries, in a worker.

        Raises:
            RuntimeError: if this is the main process, which would wait for itself, if the main process is gone, or if it does
                something else for longer than :attr:`patience`.
        """
        until = time.monotonic() + self.patience
        while self.is_pending:
            main = multiprocessing.parent_process()
            if main is None or not main.is_alive() or int(self._pending) == _GIVEN_UP:
                self.require()
            if int(self._pending) == _AT_WORK:
                until = time.monotonic() + self.patience
            if time.monotonic() > until:
                raise RuntimeError(
                    f"Expected a {type(self).__name__} with entries within {self.patience:.0f} s: {self.missing}. {_WAY_OUT}"
                )
            time.sleep(0.002)

    def copy_(self, *values: Tensor) -> None:
        """Write the entries, and let waiting workers go on.

        Args:
            values: One tensor of integers for each of the shapes.
        """
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.copy_(value)
        self.is_pending = False  # last: a worker that sees it finds all entries there

    def _give_up(self) -> None:
        if self.is_pending:
            self._pending.fill_(_GIVEN_UP)  # workers that wait end with an error, and need not be killed

    def _map(self) -> None:
        size = 1 + sum(torch.Size(shape).numel() for shape in self.shapes)
        self._cut(torch.from_file(self.path, shared=True, size=size, dtype=torch.int32))

    def _cut(self, whole: Tensor) -> None:
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        self._whole = whole
        self._pending = whole[0]  # in the file as well, so that workers see it change
        parts = whole[1:].split(sizes)
        self.tensors: tuple[Tensor, ...] = tuple(
            part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)
        )

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker gets the path and maps the same file. The entries themselves would be a copy.
        if Path(self.path).exists():
            return {"path": self.path, "shapes": self.shapes}
        return self._own_state()  # after a fit, the file is gone

    def __setstate__(self, state: dict[str, Any]) -> None:
        whole = state.pop("whole", None)
        self.__dict__.update(state)
        if whole is None:
            self._map()
        else:
            self._cut(whole)
        self._finalizer = weakref.finalize(self, _remove, self.path, -1, -1)  # the file belongs to who made it

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedIntegers":
        """Return a copy with entries of its own, without a file."""
        copied = type(self).__new__(type(self))
        copied.__setstate__(self._own_state())
        return copied

    def _own_state(self) -> dict[str, Any]:
        return {"path": self.path, "shapes": self.shapes, "whole": self._whole.clone()}


def reserve(handle: int, size: int) -> None:
    """Take the room for a file on the disk, so that later writes find it.

    Args:
        handle: The file, open for writing and empty.
        size: Its size in bytes.

    Raises:
        OSError: if there is no room.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that can't, without a way around it
                raise
    zeros = bytes(1 << 20)
    while size > 0:
        size -= os.write(handle, zeros[:size])


def sweep(folder: str) -> None:
    """Delete the files that killed processes of this user on this machine left in a folder.

    Args:
        folder: The folder. Files of others stay, and so do those of processes that still run.
    """
    for path in Path(folder).glob(f"{_prefix()}*"):
        with suppress(OSError):  # it is in use, or someone else's, or another process has just deleted it
            if fcntl is None:
                path.unlink()
            elif path.stat().st_uid == os.getuid():
                _unlink_if_unlocked(path)


def _unlink_if_unlocked(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the lock of a process ends with it, however that ends
        path.unlink()
    finally:
        os.close(handle)


def _locked_file() -> tuple[int, str]:
    """Make a file that :func:`sweep` leaves alone as long as this process, or one that it forked, has it open."""
    while True:
        handle, path = tempfile.mkstemp(prefix=_prefix())
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks, where nothing can be swept either
                fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # else another process has swept it before it was locked
            return handle, path
        os.close(handle)


def _prefix() -> str:
    # The machine, because a folder may be shared by several, which do not see each other's locks.
    return f"lightning-itm-{blake2b(platform.node().encode(), digest_size=4).hexdigest()}-"


def _remove(path: str, handle: int, process: int) -> None:
    if os.getpid() == process:  # not in a worker that was forked
        os.close(handle)  # first: Windows deletes no file that is open
        Path(path).unlink(missing_ok=True)
