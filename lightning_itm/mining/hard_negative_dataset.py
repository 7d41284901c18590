"""The pairs that come with a draw from a table of mined negatives."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_itm.data.pairs import ImageTextDataset, UnreadablePairError
from lightning_itm.mining.negative_table import NegativeTable


class HardNegativeDataset(Dataset[dict[str, Any]]):
    """Pairs, each with a draw from the negatives mined for it.

    For a pair (I1, T1): a text T3 of the table's row for I1, the image I4 it belongs to; an image I3 of the row for T1, and a
    random text T4 of it. A pair for which nothing was mined carries its own data, and the id −1.

    Args:
        pairs: The pairs.
        table: The negatives; default: an empty one, of 300 texts and 60 images.
        coupled_ranks: One draw for both: n of T3 and n · 60 // 300 of I3, as published. Else two.

    Raises:
        TypeError: ``pairs`` is no :class:`ImageTextDataset`.
        ValueError: The table is of another set.

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
        self.order = pairs.text_image_id.argsort(stable=True)
        self.end = torch.bincount(pairs.text_image_id, minlength=sizes[0]).cumsum(0)

    def evaluation(self) -> ImageTextDataset:
        """Return the pairs alone, with evaluation transforms."""
        return self.pairs.evaluation()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.with_negatives(self.pairs[index])

    def with_negatives(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Add a draw to a pair."""
        self.table.wait()
        text_id, image_id = self.draw(self.table.texts[sample["image_id"]], self.table.images[sample["text_id"]])
        of_text = int(self.pairs.text_image_id[text_id]) if text_id >= 0 else -1
        of_image = self._some_text(image_id) if image_id >= 0 else -1
        image_of_text, text, image_id_of_text = self._load(of_text, text_id, sample)
        image, text_of_image, image_id = self._load(image_id, of_image, sample)
        hard = {
            "text": text,
            "image_of_text": image_of_text,
            "image_id_of_text": image_id_of_text,
            "image": image,
            "text_of_image": text_of_image,
            "image_id": image_id,
        }
        return {**sample, "hard": hard}

    def _load(self, image_id: int, text_id: int, sample: dict[str, Any]) -> tuple[Any, Any, int]:
        if image_id >= 0:
            try:
                return self.pairs.load_image(image_id), self.pairs.load_text(text_id), image_id
            except UnreadablePairError as error:
                self.pairs.report(error)
        return sample["image"], sample["text"], -1

    def draw(self, texts: Tensor, images: Tensor) -> tuple[int, int]:
        """Draw a text and an image from a row of the table each; −1 where there is none.

        Args:
            texts: The hardest texts of an image.
            images: The hardest images of a text.
        """
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
