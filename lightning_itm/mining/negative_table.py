"""The table of mined negatives, a draw from its rows, and which checkpoints of it a run can go on from."""

import hashlib
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.identity import set_difference
from lightning_itm.shared_integers import SharedIntegers


class NegativeTable(SharedIntegers):
    """Hold the hardest texts of every image and the hardest images of every text, in a file that all processes map.

    Workers that are already running see a new table at once, because it is written into the file that they have mapped.

    Args:
        num_images: Number of images of the set, which is the number of rows of :attr:`texts`.
        num_texts: Number of texts of the set, which is the number of rows of :attr:`images`.
        texts_per_image: Most texts that are kept per image, such as 300.
        images_per_text: Most images that are kept per text, such as 60.
    """

    missing: ClassVar[str] = "nothing was mined before the first batch"

    def __init__(self, num_images: int, num_texts: int, *, texts_per_image: int, images_per_text: int) -> None:
        super().__init__(((num_images, texts_per_image), (num_texts, images_per_text)))
        self.clear()

    @property
    def texts(self) -> Tensor:
        """int32 `(num_images, texts_per_image)`, the hardest texts of each image first. The rest of a row is −1."""
        return self.tensors[0]

    @property
    def images(self) -> Tensor:
        """int32 `(num_texts, images_per_text)`, the hardest images of each text first. The rest of a row is −1."""
        return self.tensors[1]

    @property
    def has_any(self) -> bool:
        """Whether anything was mined. Rows are filled from the front."""
        return bool((self.texts[:, 0] >= 0).any() or (self.images[:, 0] >= 0).any())

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
        self.copy_(texts, images)


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


def draw_from_row(
    texts: Tensor, images: Tensor, first: float, second: float, *, coupled_ranks: bool
) -> tuple[int, int]:
    """Draw as :func:`draw_from_rows` does, from one row each, in plain numbers, which is faster there.

    Args:
        texts: Integers `(texts_per_image,)` on the CPU, the hardest texts of an image.
        images: Integers `(images_per_text,)` on the CPU, the hardest images of a text.
        first: Random number in [0, 1), which chooses the rank of the text.
        second: Random number in [0, 1), which chooses the rank of the image where it is not coupled, or no text was mined.
        coupled_ranks: Derive the rank of the image from that of the text, where a text was mined.

    Returns:
        The ids of a text and of an image, −1 where none was mined.
    """
    num_texts, num_images = (int(np.count_nonzero(row.numpy() >= 0)) for row in (texts, images))
    text_rank, image_rank = int(first * num_texts), int(second * num_images)
    if coupled_ranks and num_texts > 0:
        image_rank = min(text_rank * len(images) // len(texts), num_images - 1)
    return int(texts[text_rank]), int(images[max(image_rank, 0)])  # rank 0 of an empty row holds −1


def fingerprint(pairs: ImageTextDataset) -> str:
    """Return what told one training set from another in older versions: its texts, and which image each belongs to.

    Example:
        >>> from PIL import Image
        >>> from lightning_itm import ImageTextDataset
        >>> from lightning_itm.mining.negative_table import fingerprint
        >>> images = [Image.new("RGB", (8, 8))]
        >>> fingerprint(ImageTextDataset(images, ["a"])) == fingerprint(ImageTextDataset(images, ["b"]))
        False
    """
    digest = hashlib.blake2b(digest_size=16)
    for text in pairs.texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")  # a separator, or "a", "b" would be "ab"
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
    difference = set_difference(state.get("set", {}), pairs.identity())
    if difference is None and "set" not in state and state["fingerprint"] != fingerprint(pairs):
        difference = "other images or texts, or another order"
    if difference is not None:
        raise ValueError(
            f"Expected the checkpoint's negatives to be of this training set, got those of another: it has {difference}. "
            "Resume with the same data, or start from the weights alone (`load_from_checkpoint`)."
        )
    places = state["texts"].shape[1], state["images"].shape[1]
    expected = table.shapes[0][1], table.shapes[1][1]
    if places != expected:
        raise ValueError(
            f"Expected {expected[0]} texts per image and {expected[1]} images per text, got {places} in the checkpoint. "
            "Resume with the same `texts_per_image` and `images_per_text`."
        )
