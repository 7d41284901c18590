"""The table of mined negatives."""

import multiprocessing
import os
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class NegativeTable:
    """The hardest texts of every image and the hardest images of every text, in a file that all processes map.

    Workers that are already running, persistent or not, see a new table without a reload: it is written into the file.

    Args:
        num_images: Rows of :attr:`texts`.
        num_texts: Rows of :attr:`images`.
        texts_per_image: Places a row of :attr:`texts`.
        images_per_text: Places a row of :attr:`images`.

    Attributes:
        texts: int32 `(num_images, texts_per_image)`, the hardest first; −1 where there is none.
        images: int32 `(num_texts, images_per_text)`, likewise.
    """

    def __init__(self, num_images: int, num_texts: int, *, texts_per_image: int, images_per_text: int) -> None:
        self.shapes = (num_images, texts_per_image), (num_texts, images_per_text)
        handle, self.path = tempfile.mkstemp(prefix="negative-table-")
        os.close(handle)
        self._map()
        self.clear()
        self._finalizer = weakref.finalize(self, _remove, self.path, os.getpid())

    def clear(self) -> None:
        """Have no negatives for anybody."""
        self.texts.fill_(-1)
        self.images.fill_(-1)

    def publish(self, texts: Tensor, images: Tensor) -> None:
        """Write what was mined, and let those go on who wait for it."""
        self.texts.copy_(texts)
        self.images.copy_(images)
        self.is_pending = False

    @property
    def is_pending(self) -> bool:
        """True while the first table is still to come; who draws has to wait."""
        return bool(self._pending)

    @is_pending.setter
    def is_pending(self, value: bool) -> None:
        self._pending.fill_(int(value))

    def remove(self) -> None:
        """Delete the file, in the process that made it; who has mapped it keeps what is in it."""
        self._finalizer()

    def wait(self) -> None:
        """Wait for the first table, in a worker.

        Raises:
            RuntimeError: In the main process, which would wait for itself; or the main process is gone.
        """
        while self.is_pending:
            main = multiprocessing.parent_process()
            if main is None or not main.is_alive():
                raise RuntimeError(
                    "Expected a table of negatives, found none: nothing was mined before the first batch."
                )
            time.sleep(0.002)

    def _map(self) -> None:
        sizes = [rows * places for rows, places in self.shapes]
        whole = torch.from_file(self.path, shared=True, size=1 + sum(sizes), dtype=torch.int32)
        self._pending = whole[0]
        self.texts, self.images = (
            part.view(shape) for part, shape in zip(whole[1:].split(sizes), self.shapes, strict=True)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "shapes": self.shapes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()


def _remove(path: str, process: int) -> None:
    if os.getpid() == process:  # not in a worker that was forked
        Path(path).unlink(missing_ok=True)
