"""Collect the embeddings of a set batch by batch, and put them in the order of the ids."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_itm.data.evaluation_items import Kind
from lightning_itm.distributed import gather, world_size
from lightning_itm.mining.encoded.split import Division, SplitRows, rows_of_all_ranks


class EncodedRows:
    """Collect the embeddings of all images, or of all texts, batch by batch, and put those of all ranks in order.

    Args:
        kind: ``"image"`` or ``"text"``, which names the keys of the batches.
        num_rows: How many there are, on all ranks together. Their ids are below it.
    """

    def __init__(self, kind: Kind, num_rows: int) -> None:
        self.kind, self.num_rows = kind, num_rows
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, batch: Mapping[str, Any]) -> None:
        """Keep the embeddings of a batch on their device, so that the host waits for nothing.

        Args:
            batch: A dict with, for images, ``"image"`` (embeddings), ``"image_id"`` and ``"image_is_valid"``.
        """
        self._parts.append((batch[self.kind], batch[f"{self.kind}_id"], batch[f"{self.kind}_is_valid"]))

    def in_order(self, *, way_out: str, during: str = "") -> tuple[Tensor, Tensor]:
        """Gather the rows of all ranks. Every rank must call it, and every rank gets everything.

        Args:
            way_out: What a user can do about embeddings that are not finite, a sentence for the message.
            during: What was done meanwhile, such as ``" when mining"``, for the message. Default: nothing.

        Returns:
            Embeddings `(num_rows, dim)` and validity `(num_rows,)`. The row is the id.

        Raises:
            ValueError: if an embedding is not finite.
        """
        embeddings, ids, is_valid = (_gather_rows(torch.cat(parts)) for parts in zip(*self._parts, strict=True))
        self._parts = []
        # The first host read of the pass: all batches are encoded by now.
        _check_finite(bool(embeddings.isfinite().all()), self.kind, during, way_out)
        # Ids that come twice, where ranks were made equal, carry equal rows, so the order of writing does not matter.
        in_order = embeddings.new_zeros(self.num_rows, embeddings.shape[1]).index_copy_(0, ids, embeddings)
        return in_order, is_valid.new_zeros(self.num_rows).index_copy_(0, ids, is_valid)


class OwnRows:
    """Collect the embeddings of the rows that a rank holds, in half precision. The others stay where they are.

    Args:
        kind: ``"image"`` or ``"text"``, which names the keys of the batches.
        division: Which rows each rank holds.
        device: Where they are kept.
    """

    def __init__(self, kind: Kind, division: Division, device: torch.device) -> None:
        self.kind, self.division = kind, division
        self.num_rows = division.num_rows
        self._num_own = division.own.stop - division.own.start
        self._rows = torch.zeros(0, dtype=torch.float16, device=device)
        self._is_valid = torch.zeros(self._num_own, dtype=torch.bool, device=device)

    def add(self, batch: Mapping[str, Any]) -> None:
        """Keep the embeddings of a batch, which :class:`EncodedRows` describes. The host waits for nothing."""
        embeddings, places = batch[self.kind], batch[f"{self.kind}_id"] - self.division.own.start
        if self._rows.ndim == 1:  # only now the width is known
            self._rows = self._rows.new_zeros(self._num_own, embeddings.shape[1])
        if self._num_own == 0:
            return  # the batch is a stand-in, so that this rank calls the encoder as often as the others
        self._rows.index_copy_(0, places, embeddings.half())
        self._is_valid.index_copy_(0, places, batch[f"{self.kind}_is_valid"])

    def in_order(self, *, way_out: str, during: str = "") -> tuple[SplitRows, Tensor]:
        """Return the own rows, and the validity of all, `(num_rows,)`. Every rank must call it.

        Args:
            way_out: What a user can do about embeddings that are not finite, a sentence for the message.
            during: What was done meanwhile, for the message.

        Raises:
            ValueError: on every rank, if an embedding of one of them is not finite.
        """
        # A rank without rows, in a small set, does not know the width.
        width = 0 if self._rows.ndim == 1 else self._rows.shape[1]
        told = gather(torch.tensor([[width, int(self._rows.isfinite().all())]], device=self._rows.device))
        _check_finite(bool(told[:, 1].all()), self.kind, during, way_out)
        own = self._rows.view(self._num_own, int(told[:, 0].max()))
        ids = torch.arange(self.num_rows)
        return SplitRows(own, self.division), rows_of_all_ranks(self._is_valid, self.division, ids)


def _check_finite(is_finite: bool, kind: Kind, during: str, way_out: str) -> None:
    if not is_finite:
        raise ValueError(f"Expected finite {kind} embeddings{during}, got NaN or infinity. {way_out}")


def _gather_rows(rows: Tensor) -> Tensor:
    if world_size() > 1:
        # Lightning's sampler for `predict` gives some ranks a row more, and a gather takes equal shapes.
        most = int(gather(torch.tensor([len(rows)], device=rows.device)).max())
        rows = torch.cat([rows, rows[-1:].repeat_interleave(most - len(rows), dim=0)])  # the last row again
    return gather(rows)
