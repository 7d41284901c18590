"""Which checkpoints of mining a run can go on from."""

import hashlib
from typing import Any

from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.mining.negative_table import NegativeTable


def fingerprint(pairs: ImageTextDataset) -> str:
    """Return what tells one training set from another: its texts, and which image each belongs to.

    Example:
        >>> from PIL import Image
        >>> from lightning_itm import ImageTextDataset
        >>> from lightning_itm.mining.state import fingerprint
        >>> images = [Image.new("RGB", (8, 8))]
        >>> fingerprint(ImageTextDataset(images, ["a"])) == fingerprint(ImageTextDataset(images, ["b"]))
        False
    """
    digest = hashlib.blake2b(digest_size=16)
    for text in pairs.texts:
        digest.update(text.encode() + b"\0")  # a separator, or "a", "b" would be "ab"
    digest.update(pairs.text_image_id.numpy().tobytes())
    return digest.hexdigest()


def check_state(state: dict[str, Any], pairs: ImageTextDataset, table: NegativeTable) -> None:
    """Raise if the state of a checkpoint does not fit the run.

    Args:
        state: What ``OfflineHardNegativeMining.state_dict`` returned.
        pairs: The training set of this run.
        table: The table of this run.

    Raises:
        ValueError: if the state is of another training set, or of a table with other numbers of negatives.
    """
    if state["fingerprint"] != fingerprint(pairs):
        raise ValueError(
            "Expected the checkpoint's negatives to be of this training set, got those of another: its images, texts or "
            "their order differ. Resume with the same data, or start from the weights alone (`load_from_checkpoint`)."
        )
    places = state["texts"].shape[1], state["images"].shape[1]
    expected = table.shapes[0][1], table.shapes[1][1]
    if places != expected:
        raise ValueError(
            f"Expected {expected[0]} texts per image and {expected[1]} images per text, got {places} in the checkpoint. "
            "Resume with the same `texts_per_image` and `images_per_text`."
        )
