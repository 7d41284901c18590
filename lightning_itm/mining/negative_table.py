"""The table of mined negatives, and the pairs that come with a draw from it."""

import multiprocessing
import os
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_itm.data.pairs import ImageTextPairs, UnreadablePairError


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


class HardNegativePairs(Dataset[dict[str, Any]]):
    """Pairs, each with a draw from the negatives mined for it.

    For a pair (I1, T1): a text T3 of the table's row for I1, the image I4 it belongs to; an image I3 of the row for T1, and a
    random text T4 of it. A pair for which nothing was mined carries its own data, and the id −1.

    Args:
        pairs: The pairs.
        table: The negatives; default: an empty one, of 300 texts and 60 images.
        coupled_ranks: One draw for both: n of T3 and n · 60 // 300 of I3, as published. Else two.

    Raises:
        TypeError: ``pairs`` are no :class:`ImageTextPairs`.
        ValueError: The table is of another set.

    References:
        *Adaptive Offline Quintuplet Loss for Image-Text Matching*, ECCV 2020, arXiv 2003.03669.
    """

    def __init__(
        self, pairs: ImageTextPairs, table: NegativeTable | None = None, *, coupled_ranks: bool = True
    ) -> None:
        if not isinstance(pairs, ImageTextPairs):
            raise TypeError(
                f"Expected ImageTextPairs, got {type(pairs).__name__}. Read other data into ImageTextPairs."
            )
        sizes = len(pairs.images), len(pairs.texts)
        self.table = table or NegativeTable(*sizes, texts_per_image=300, images_per_text=60)
        if (self.table.shapes[0][0], self.table.shapes[1][0]) != sizes:
            raise ValueError(
                f"Expected a table of {sizes[0]} images and {sizes[1]} texts, got one of {self.table.shapes}."
            )
        self.pairs, self.coupled_ranks = pairs, coupled_ranks
        self.order = pairs.text_image_id.argsort(stable=True)
        self.end = torch.bincount(pairs.text_image_id, minlength=sizes[0]).cumsum(0)

    def evaluation(self) -> ImageTextPairs:
        """Return the pairs alone, with evaluation transforms."""
        return self.pairs.evaluation()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.with_negatives(self.pairs[index])

    def with_negatives(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Add a draw to a pair."""
        self.table.wait()
        text_id, image_id = self._draw(self.table.texts[sample["image_id"]], self.table.images[sample["text_id"]])
        of_text = int(self.pairs.text_image_id[text_id]) if text_id >= 0 else -1
        of_image = self._some_text(image_id) if image_id >= 0 else -1
        hard_text_image, hard_text, hard_text_image_id = self._load(of_text, text_id, sample)
        hard_image, hard_image_text, hard_image_id = self._load(image_id, of_image, sample)
        return {
            **sample,
            "hard_text": hard_text,
            "hard_text_image": hard_text_image,
            "hard_text_image_id": hard_text_image_id,
            "hard_image": hard_image,
            "hard_image_text": hard_image_text,
            "hard_image_id": hard_image_id,
        }

    def _load(self, image_id: int, text_id: int, sample: dict[str, Any]) -> tuple[Any, Any, int]:
        if image_id >= 0:
            try:
                return self.pairs.load_image(image_id), self.pairs.load_text(text_id), image_id
            except UnreadablePairError as error:
                self.pairs.report(error)
        return sample["image"], sample["text"], -1

    def _draw(self, texts: Tensor, images: Tensor) -> tuple[int, int]:
        num_texts, num_images = int((texts >= 0).sum()), int((images >= 0).sum())
        first, second = torch.rand(2).tolist()
        text_place = int(first * num_texts)
        if self.coupled_ranks and num_texts:
            image_place = min(text_place * len(images) // len(texts), num_images - 1)
        else:
            image_place = int(second * num_images)
        return (
            int(texts[text_place]) if num_texts else -1,
            int(images[image_place]) if num_images else -1,
        )

    def _some_text(self, image_id: int) -> int:
        start = int(self.end[image_id - 1]) if image_id else 0
        return int(self.order[start + int(torch.randint(int(self.end[image_id]) - start, ()))])


def _remove(path: str, process: int) -> None:
    if os.getpid() == process:  # not in a worker that was forked
        Path(path).unlink(missing_ok=True)
