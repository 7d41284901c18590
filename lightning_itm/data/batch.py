"""What a batch is before the encoders."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from torch import Tensor
from torch.utils.data import default_collate

from lightning_itm.data.padded_sequence import pad_if_ragged


class ImageTextBatch(TypedDict):
    """The keys that every batch has. A plain dict with these keys will do.

    Ids are dense, from 0. Pairs that share an ``image_id`` are never each other's negatives.
    """

    image: Any
    """What ``encode_image`` takes, usually a tensor `(pairs, channels, height, width)`."""
    text: Any
    """What ``encode_text`` takes, usually token ids `(pairs, context_length)`."""
    image_id: Tensor
    """int64 `(pairs,)`."""
    text_id: Tensor
    """int64 `(pairs,)`."""


BATCH_KEYS = tuple(ImageTextBatch.__annotations__)


def check_batch(batch: Any) -> None:
    """Say what is missing in a batch.

    Raises:
        TypeError: The batch is no mapping.
        ValueError: A key of :class:`ImageTextBatch` is missing.
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


def collate_pairs(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack samples into a batch.

    Args:
        samples: One dict a pair, as :class:`~lightning_itm.ImageTextDataset` returns them.

    Returns:
        A batch: numbers and tensors stacked, strings in a list, sequences of several lengths padded.

    Raises:
        ValueError: Images or texts of several shapes, which no batch can hold.
    """
    for key in ("image", "text"):
        shapes = {tuple(value.shape) for sample in samples if isinstance(value := sample.get(key), Tensor)}
        if len(shapes) > 1:
            raise ValueError(
                f"Expected every {key} of a batch to have one shape, got {sorted(shapes)}. "
                + (
                    "Give `ImageTextDataset` a `transform` and an `eval_transform` that resize."
                    if key == "image"
                    else ""
                )
                + ("Give `ImageTextDataset` a `tokenizer` that pads to a fixed length." if key == "text" else "")
            )
    stacked = {key: _stack([sample[key] for sample in samples]) for key in samples[0]}
    stacked = {key: values for key, values in stacked.items() if values is not None}
    rest = [{key: value for key, value in sample.items() if key not in stacked} for sample in samples]
    return {**default_collate(rest), **stacked}


def _stack(values: list[Any]) -> Any:
    """Stack what ``default_collate`` can't: mined negatives, which are samples again, and sequences of several lengths."""
    return collate_pairs(values) if isinstance(values[0], Mapping) else pad_if_ragged(values)
