"""The pairs that come with a draw from a table of mined negatives, and those that are mined."""

from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import Dataset

from lightning_itm.data.datamodule import ImageTextDataModule
from lightning_itm.data.evaluation_items import TextsOfImages
from lightning_itm.data.pairs import ImageTextDataset, UnreadablePairError
from lightning_itm.data.shards.stream import ShardStream
from lightning_itm.mining.negative_table import NegativeTable, draw_from_row


class HardNegativeDataset(Dataset[dict[str, Any]]):
    """Add to each pair a draw from the negatives that were mined for it.

    For a pair (I1, T1), two pairs are drawn: a text T3 of the table's row for I1 with its image I4, and an image I3 of the
    row for T1 with a random text T4 of it. They are the dict ``"hard"`` of the sample. Where nothing was mined, the pair's own
    data stand there, with the id −1. Where images of the set share captions, it has the ``caption_id`` of T3 and the
    ``caption_id_of_image``, that of T4.

    Args:
        pairs: The pairs that are trained on.
        table: What was mined for them. Default: an empty table of 300 texts per image and 60 images per text.
        coupled_ranks: Draw one rank n for both, as published: T3 is the text of rank n, and I3 the image of rank
            n · 60 // 300. False: draw two ranks, which gives more combinations.

    Raises:
        TypeError: if ``pairs`` is no :class:`~lightning_itm.ImageTextDataset`.
        ValueError: if the table has other numbers of images and texts than ``pairs``.

    References:
        *Adaptive Offline Quintuplet Loss for Image-Text Matching*, ECCV 2020, arXiv 2003.03669.
    """

    def __init__(
        self, pairs: ImageTextDataset, table: NegativeTable | None = None, *, coupled_ranks: bool = True
    ) -> None:
        if not isinstance(pairs, ImageTextDataset):
            raise TypeError(
                f"Expected an ImageTextDataset, got {type(pairs).__name__}. Read other data into an ImageTextDataset."
            )
        sizes = len(pairs.images), len(pairs.texts)
        self.table = table or NegativeTable(*sizes, texts_per_image=300, images_per_text=60)
        if (self.table.shapes[0][0], self.table.shapes[1][0]) != sizes:
            raise ValueError(
                f"Expected a table of {sizes[0]} images and {sizes[1]} texts, got one of {self.table.shapes}."
            )
        self.pairs, self.coupled_ranks = pairs, coupled_ranks
        self.texts_of = TextsOfImages(pairs.text_image_id, sizes[0])

    def evaluation(self) -> ImageTextDataset:
        """Return the pairs alone, with evaluation transforms."""
        return self.pairs.evaluation()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.with_negatives(self.pairs[index])

    def with_negatives(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Return the sample with a draw under ``"hard"``.

        Args:
            sample: A pair, as :class:`~lightning_itm.ImageTextDataset` returns it.
        """
        self.table.wait()  # a worker may be asked for its first batch before anything is mined
        text_id, image_id = self.draw(self.table.texts[sample["image_id"]], self.table.images[sample["text_id"]])
        image_id_of_text = int(self.pairs.text_image_id[text_id]) if text_id >= 0 else -1
        text_id_of_image = self._random_text(image_id) if image_id >= 0 else -1
        image_of_text, text, image_id_of_text = self._load(image_id_of_text, text_id, sample)
        image, text_of_image, image_id = self._load(image_id, text_id_of_image, sample)
        captions = {}
        if self.pairs.caption_id is not None:
            loaded = {"caption_id": (image_id_of_text, text_id), "caption_id_of_image": (image_id, text_id_of_image)}
            captions = {key: int(self.pairs.caption_id[t]) if i >= 0 else -1 for key, (i, t) in loaded.items()}
        hard = {
            "text": text,
            "image_of_text": image_of_text,
            "image_id_of_text": image_id_of_text,
            "image": image,
            "text_of_image": text_of_image,
            "image_id": image_id,
            **captions,
        }
        return {**sample, "hard": hard}

    def _load(self, image_id: int, text_id: int, sample: dict[str, Any]) -> tuple[Any, Any, int]:
        if image_id >= 0:
            try:
                return self.pairs.load_image(image_id), self.pairs.load_text(text_id), image_id
            except UnreadablePairError as error:
                self.pairs.report(error, text_id)
        return sample["image"], sample["text"], -1

    def draw(self, texts: Tensor, images: Tensor) -> tuple[int, int]:
        """Draw from one row of the table's texts and one of its images, with PyTorch's random numbers.

        Args:
            texts: `(texts_per_image,)`, the hardest texts of an image.
            images: `(images_per_text,)`, the hardest images of a text.

        Returns:
            The id of a text and that of an image, −1 where there is none.
        """
        # Both numbers are always drawn, so that later draws do not depend on `coupled_ranks`.
        first, second = torch.rand(2).tolist()
        return draw_from_row(texts, images, first, second, coupled_ranks=self.coupled_ranks)

    def _random_text(self, image_id: int) -> int:
        index = int(torch.randint(int(self.texts_of.count[image_id]), ()))
        return int(self.texts_of.order[int(self.texts_of.start[image_id]) + index])


def pairs_to_mine(given: Any, datamodule: Any) -> ImageTextDataset:
    """Return the pairs of a training set without what wraps them.

    Args:
        given: The dataset that the user names. ``None``: the datamodule's ``train_dataset``.
        datamodule: The Trainer's datamodule, or ``None``.

    Raises:
        MisconfigurationException: if there are no pairs, or fewer than two images.
    """
    dataset = train_set(given, datamodule)
    pairs = dataset.pairs if isinstance(dataset, HardNegativeDataset | ShardStream) else dataset
    if not isinstance(pairs, ImageTextDataset):
        raise MisconfigurationException(
            f"Expected pairs to mine, got {type(pairs).__name__}. Give `dataset=ImageTextDataset(...)`, or fit with an "
            "ImageTextDataModule that has them as `train_dataset`."
        )
    if len(pairs.images) < 2:
        raise MisconfigurationException(f"Expected at least two images to mine among, got {len(pairs.images)}.")
    return pairs


def train_set(given: Any, datamodule: Any) -> Any:
    """Return the dataset that the user names, or else the datamodule's training set, with what wraps its pairs."""
    return getattr(datamodule, "train_dataset", None) if given is None else given


def check_batches_can_be_composed(dataset: Any, pairs: ImageTextDataset, datamodule: Any, trainer: L.Trainer) -> None:
    """Raise if the order of the pairs is not the datamodule's to choose, or if the loss needs random batches.

    Args:
        dataset: The training set, with what wraps its pairs.
        pairs: The pairs that are mined.
        datamodule: The Trainer's datamodule, or ``None``.
        trainer: The Trainer, whose module has the loss.

    Raises:
        MisconfigurationException: if it is so.
    """
    if isinstance(dataset, ShardStream):
        raise MisconfigurationException(
            "Expected pairs that can be read in any order with `inject='batches'`, got a ShardStream, which reads shards "
            "from front to back. Train on its `ShardDataset` (`stream=False`), or use `inject='embeddings'`."
        )
    is_ours = isinstance(datamodule, ImageTextDataModule)
    if not is_ours or pairs is not pairs_to_mine(None, datamodule):
        raise MisconfigurationException(
            "Expected an ImageTextDataModule with the pairs as `train_dataset` with `inject='batches'`, got "
            f"{type(datamodule).__name__ if not is_ours else 'another set in the datamodule'}. It orders the pairs of an "
            "epoch. For a loader of your own, call `lightning_itm.mining.compose_batches`."
        )
    if getattr(loss := getattr(trainer.lightning_module, "loss", None), "needs_random_batches", False):
        raise MisconfigurationException(
            "Expected a loss that compares candidates with each other with `inject='batches'`, got "
            f"{type(loss).__name__}, which learns how rare a match is in a random batch. Hard batches made it worse in our "
            "runs. Use InfoNCELoss or a TripletLoss, or `inject='samples'`."
        )
