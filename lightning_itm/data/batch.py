"""What a batch is before the encoders, and how samples become one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate


class ImageTextBatch(TypedDict):
    """Name the keys that every batch has. A plain dict with these keys will do.

    Ids are dense and start at 0. Pairs that share an ``image_id`` are never each other's negatives. Nor are pairs that share a
    ``caption_id``, int64 `(pairs,)`, the number of the caption. It is optional, and −1 where it is not known.
    :func:`~lightning_itm.captions.number_captions` makes it.
    """

    image: Any
    """What ``encode_image`` takes, usually a tensor `(pairs, channels, height, width)`."""
    text: Any
    """What ``encode_text`` takes, usually token ids `(pairs, context_length)`, or a dict of these and an attention mask."""
    image_id: Tensor
    """int64 `(pairs,)`."""
    text_id: Tensor
    """int64 `(pairs,)`."""


BATCH_KEYS = tuple(ImageTextBatch.__annotations__)


def check_batch(batch: Any) -> None:
    """Raise if a batch lacks a key that the training step needs.

    Raises:
        TypeError: if the batch is no mapping.
        ValueError: if a key of :class:`ImageTextBatch` is missing.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"Expected the batch to be a dict with the keys {list(BATCH_KEYS)}, got {type(batch).__name__}. "
            "Let the dataset return such dicts, or override `embed`."
        )
    missing = [key for key in BATCH_KEYS if key not in batch]
    if missing:
        raise ValueError(
            f"Expected the batch to have the keys {list(BATCH_KEYS)}; {missing} missing, got {list(batch)}. "
            "Number the images and texts from 0: pairs that share an `image_id` are never each other's negatives."
        )


_OF_IMAGE = "Give `ImageTextDataset` a `transform` and an `eval_transform` that resize."
_OF_TEXT = "Give `ImageTextDataset` a `tokenizer` that pads to a fixed length."
_WAYS_OUT = {"image": _OF_IMAGE, "pixel_values": _OF_IMAGE}  # all other tensors of unequal lengths are texts


def collate_pairs(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack samples into a batch.

    Args:
        samples: One dict for each pair, as :class:`~lightning_itm.ImageTextDataset` returns them.

    Returns:
        A batch. Numbers and tensors are stacked, also those of a dict in a sample, such as ``input_ids`` and
        ``attention_mask`` of a text. Strings and PIL images are in a list, for models that prepare their own inputs, and
        sequences of several lengths are padded.

    Raises:
        ValueError: if images or texts have several shapes, which no batch can hold.
    """
    # PyTorch's own message names two sizes, and not what they are sizes of.
    for key in samples[0]:
        shapes = {tuple(value.shape) for sample in samples if isinstance(value := sample.get(key), Tensor)}
        if len(shapes) > 1:
            raise ValueError(
                f"Expected every {key} of a batch to have one shape, got {sorted(shapes)}. {_WAYS_OUT.get(key, _OF_TEXT)}"
            )
    # Mined negatives, PIL images and ragged sequences first: `default_collate` does not know them. The rest is left to it.
    stacked = {key: _stack([sample[key] for sample in samples]) for key in samples[0]}
    stacked = {key: values for key, values in stacked.items() if values is not None}
    rest = [{key: value for key, value in sample.items() if key not in stacked} for sample in samples]
    return {**default_collate(rest), **stacked}  # ids are int64 (pairs,) now


def _stack(values: list[Any]) -> Any:
    """Stack what ``default_collate`` can't: mined negatives, which are samples again, and sequences of several lengths."""
    if isinstance(values[0], Image.Image):
        return values
    return collate_pairs(values) if isinstance(values[0], Mapping) else pad_if_ragged(values)


@dataclass
class PaddedSequence:
    """Hold sequences of several lengths in one tensor, filled up with zeros to the length of the longest.

    Args:
        values: The sequences `(sequences, longest, ...)`, such as the regions of images or the words of captions.
        lengths: The length of each sequence, int64 `(sequences,)`, at least 1.

    Raises:
        ValueError: if the two do not match in number, or if a length is 0 or more than there are values. The lengths are only
            checked on the CPU.

    Example:
        >>> import torch
        >>> from lightning_itm.data import PaddedSequence
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
        """Copy both to pinned memory, from where a device reads without the host waiting. PyTorch's loaders call this."""
        return PaddedSequence(self.values.pin_memory(), self.lengths.pin_memory())

    @classmethod
    def pad(cls, sequences: Sequence[Tensor]) -> "PaddedSequence":
        """Put tensors `(length, ...)` into one, with zeros after the end of each."""
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        return cls(pad_sequence(list(sequences), batch_first=True), lengths)  # (sequences, longest, ...)


@dataclass
class Unpadded:
    """Mark a tensor of a sample as a sequence, which :func:`~lightning_itm.data.collate_pairs` pads."""

    values: Tensor


def pad_if_ragged(values: Sequence[Any]) -> Any:
    """Return sequences as a :class:`PaddedSequence`, and None for anything else."""
    if values and all(isinstance(value, Unpadded) for value in values):
        return PaddedSequence.pad([value.values for value in values])
    return None
