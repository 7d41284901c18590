"""Sets of regions, and sentences of words: tensors of several lengths in one batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass
class PaddedSequence:
    """Sequences of several lengths, filled up with zeros to that of the longest.

    Args:
        values: `(sequences, longest, ...)`.
        lengths: int64 `(sequences,)`, from 1.

    Raises:
        ValueError: The two do not match in number, or, where they are on the CPU, a length is 0 or more than there are values.

    Example:
        >>> PaddedSequence.pad([torch.ones(2), torch.ones(1)]).values
        tensor([[1., 1.],
                [1., 0.]])
    """

    values: Tensor
    lengths: Tensor

    def __post_init__(self) -> None:
        if self.lengths.ndim != 1 or len(self.values) != len(self.lengths):
            raise ValueError(
                f"Expected one length for each of the {len(self.values)} sequences, got the shape {tuple(self.lengths.shape)}."
            )
        if self.lengths.device.type == "cpu" and len(self.lengths):  # elsewhere the host would wait
            shortest, longest = int(self.lengths.min()), int(self.lengths.max())
            if shortest < 1 or longest > self.values.shape[1]:
                raise ValueError(
                    f"Expected lengths from 1 to {self.values.shape[1]}, the padded one, got {shortest} to {longest}. Leave "
                    "empty sets and sentences out."
                )

    def __len__(self) -> int:
        return len(self.lengths)

    def pin_memory(self) -> "PaddedSequence":
        """Copy both to pinned memory, from where a device reads without the host waiting; PyTorch's loaders call this."""
        return PaddedSequence(self.values.pin_memory(), self.lengths.pin_memory())

    @classmethod
    def pad(cls, sequences: Sequence[Tensor]) -> "PaddedSequence":
        """Put tensors `(length, ...)` together."""
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        return cls(pad_sequence(list(sequences), batch_first=True), lengths)


@dataclass
class Unpadded:
    """One sequence of a sample, which :func:`~lightning_itm.data.collate_pairs` pads."""

    values: Tensor


def pad_if_ragged(values: Sequence[Any]) -> Any:
    """Return a PaddedSequence of what is Unpadded, and None for anything else."""
    if values and all(isinstance(value, Unpadded) for value in values):
        return PaddedSequence.pad([value.values for value in values])
    return None
