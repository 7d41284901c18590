"""Train with negatives that were mined before. Nothing is searched in training."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.mining.mine import Mining
from lightning_itm.mining.written.rows import find_files, read_negatives


class WrittenMining(Mining):
    """Hold what one fit reads from files instead of mining it.

    Args:
        folder: What ``lightning-itm mine`` or :class:`~lightning_itm.NegativeWriter` wrote.
        *args: Those of :class:`~lightning_itm.mining.mine.Mining`.
        **kwargs: Those of :class:`~lightning_itm.mining.mine.Mining`.

    Raises:
        FileNotFoundError: if the files are not there.
    """

    def __init__(self, folder: str | Path, *args: Any, **kwargs: Any) -> None:
        find_files(folder)  # now, and not when the first epoch begins
        super().__init__(*args, **kwargs)
        self.folder = folder

    def mine(self, trainer: L.Trainer, module: L.LightningModule, epoch: int, **options: Any) -> dict[str, float]:
        """Read the table for an epoch. Each rank reads the same files.

        Raises:
            ValueError: if the table is of another set, or too small.
        """
        start = time.perf_counter()
        self.table.publish(*self._read())
        self.progress.is_mined = True
        logs = {"mining/read_seconds": time.perf_counter() - start}
        return {**logs, **self.injection.begin_epoch(epoch)}

    def load_state_dict(self, state: dict[str, Any], is_due: Callable[[int], bool]) -> None:
        """Take in the table of a checkpoint.

        Raises:
            ValueError: if it is not that of the files.
        """
        super().load_state_dict(state, is_due)
        if self.progress.is_mined:
            for name, read in zip(("texts", "images"), self._read(), strict=True):
                num_different = int((state[name] != read).sum())
                if num_different:
                    raise ValueError(
                        f"Expected the checkpoint's negatives to be those of `table`, {self.folder}, got {num_different} of "
                        f"{read.numel()} {name} that differ. Resume with the same files, or start from the weights alone "
                        "(`load_from_checkpoint`)."
                    )

    def _read(self) -> tuple[torch.Tensor, torch.Tensor]:
        return read_negatives(self.folder, self.pairs, self.table.shapes[0][1], self.table.shapes[1][1])


def make_mining(folder: str | Path | None, pairs: ImageTextDataset, given: Any, **options: Any) -> Mining:
    """Return what mines a set, or what reads the files of a folder instead. ``options`` are those of :class:`Mining`."""
    return Mining(pairs, given, **options) if folder is None else WrittenMining(folder, pairs, given, **options)


def check_table(folder: Any, *, inject: str, encode: str, every_n_epochs: int | None, guards: dict[str, Any]) -> None:
    """Raise if an option of mining is given beside a table, which was mined already.

    Args:
        folder: The folder of the table. ``None``: there is none, and all is well.
        inject: How the negatives reach the steps.
        encode: How the embeddings are had that are mined.
        every_n_epochs: How often a set is mined.
        guards: What leaves out likely false negatives, and how negatives are found.

    Raises:
        ValueError: if one of them can't be followed.
    """
    if folder is None:
        return
    if inject == "embeddings":
        raise ValueError(
            "Expected `inject='samples'` or `'batches'` with `table`, got 'embeddings': the files have no embeddings. Leave "
            "`table` out, and mine in training."
        )
    if encode != "pass":
        raise ValueError(f"Expected no `encode` with `table`, which is encoded already, got {encode!r}. Leave one out.")
    if every_n_epochs not in (1, None):
        raise ValueError(
            f"Expected no `every_n_epochs` with `table`, which is the same in each epoch, got {every_n_epochs}. Leave it out."
        )
    for name, value in guards.items():
        if value not in (0, None, "auto", "exact"):
            raise ValueError(
                f"Expected no `{name}` with `table`, got {value}. The files have what was left after mining. Give it to "
                "`lightning-itm mine`."
            )
