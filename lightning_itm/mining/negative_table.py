"""The table of mined negatives, and a draw from its rows."""

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
    """Hold the hardest texts of every image and the hardest images of every text, in a file that all processes map.

    Workers that are already running see a new table at once, because it is written into the file that they have mapped.

    Args:
        num_images: Number of images of the set, which is the number of rows of :attr:`texts`.
        num_texts: Number of texts of the set, which is the number of rows of :attr:`images`.
        texts_per_image: Most texts that are kept per image, such as 300.
        images_per_text: Most images that are kept per text, such as 60.

    Attributes:
        texts: int32 `(num_images, texts_per_image)`, the hardest first. The rest of a row is −1.
        images: int32 `(num_texts, images_per_text)`, the hardest first. The rest of a row is −1.
    """

    def __init__(self, num_images: int, num_texts: int, *, texts_per_image: int, images_per_text: int) -> None:
        self.shapes = (num_images, texts_per_image), (num_texts, images_per_text)
        # A file and not `share_memory_()`: /dev/shm is small in containers.
        handle, self.path = tempfile.mkstemp(prefix="negative-table-")
        os.close(handle)
        self._map()
        self.clear()
        self._finalizer = weakref.finalize(self, _remove, self.path, os.getpid())

    def clear(self) -> None:
        """Remove all entries."""
        self.texts.fill_(-1)
        self.images.fill_(-1)

    def publish(self, texts: Tensor, images: Tensor) -> None:
        """Write what was mined, and let waiting workers go on.

        Args:
            texts: Integers, shaped as :attr:`texts`.
            images: Integers, shaped as :attr:`images`.
        """
        self.texts.copy_(texts)
        self.images.copy_(images)
        self.is_pending = False  # last: a worker that sees it finds all entries there

    @property
    def is_pending(self) -> bool:
        """True while the first table is still to come. A worker that draws has to wait for it."""
        return bool(self._pending)

    @is_pending.setter
    def is_pending(self, value: bool) -> None:
        self._pending.fill_(int(value))

    def remove(self) -> None:
        """Delete the file, in the process that made it. Processes that have mapped it keep its content."""
        self._finalizer()

    def wait(self) -> None:
        """Wait for the first table, in a worker.

        Raises:
            RuntimeError: if this is the main process, which would wait for itself, or if the main process is gone.
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
        self._pending = whole[0]  # in the file as well, so that workers see it change
        self.texts, self.images = (
            part.view(shape) for part, shape in zip(whole[1:].split(sizes), self.shapes, strict=True)
        )

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker gets the path and maps the same file. The entries themselves would be a copy.
        return {"path": self.path, "shapes": self.shapes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()


def draw_from_rows(
    texts: Tensor, images: Tensor, first: Tensor, second: Tensor, *, coupled_ranks: bool
) -> tuple[Tensor, Tensor]:
    """Draw a mined text and a mined image from rows of the table.

    A rank n below the number of mined texts is drawn for the text. The image has the rank n · images_per_text //
    texts_per_image, or one of its own.

    Args:
        texts: Integers `(rows, texts_per_image)`, the hardest texts of each image, −1 at the end of a row that is not full.
        images: Integers `(rows, images_per_text)`, the hardest images of each text, likewise.
        first: Random numbers in [0, 1), `(rows,)`, which choose the rank of the text.
        second: Random numbers in [0, 1), `(rows,)`, which choose the rank of the image where it is not coupled, or no text
            was mined.
        coupled_ranks: Derive the rank of the image from that of the text, as published, where a text was mined.

    Returns:
        The ids of a text and of an image, `(rows,)` each, −1 where none was mined.

    Example:
        >>> import torch
        >>> from lightning_itm.mining import draw_from_rows
        >>> texts, images = torch.tensor([[8, 6, 4, 2]]), torch.tensor([[7, 5]])
        >>> draw_from_rows(texts, images, torch.tensor([0.6]), torch.tensor([0.1]), coupled_ranks=True)
        (tensor([4]), tensor([5]))

    References:
        *Adaptive Offline Quintuplet Loss for Image-Text Matching*, ECCV 2020, arXiv 2003.03669. There every row is full.
    """
    # Rows are filled from the front, so a rank below the number of entries is never an empty place.
    num_texts, num_images = (texts >= 0).sum(dim=1), (images >= 0).sum(dim=1)  # (rows,) each
    text_rank, image_rank = (first * num_texts).long(), (second * num_images).long()
    if coupled_ranks:
        coupled = torch.minimum(text_rank * images.shape[1] // texts.shape[1], num_images - 1)
        image_rank = torch.where(num_texts > 0, coupled, image_rank)
    # In an empty row rank 0 holds −1, which is the answer there.
    drawn = [
        part.gather(1, rank.clamp_min(0)[:, None]).squeeze(1).long()  # (rows,)
        for part, rank in ((texts, text_rank), (images, image_rank))
    ]
    return drawn[0], drawn[1]


def _remove(path: str, process: int) -> None:
    if os.getpid() == process:  # not in a worker that was forked
        Path(path).unlink(missing_ok=True)
