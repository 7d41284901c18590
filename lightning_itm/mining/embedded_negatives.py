"""Mined negatives as embeddings, drawn on the device."""

import torch
from torch import Tensor

from lightning_itm.data.evaluation_items import TextsOfImages
from lightning_itm.embeddings import EmbeddingPairs, HardNegatives
from lightning_itm.mining.negative_table import draw_from_rows
from lightning_itm.randomness import uniform


class EmbeddedNegatives:
    """Draw mined negatives as embeddings of the mining pass, on the device.

    A draw depends on seed, epoch and text id alone. So a run that is stopped and resumed draws the same negatives again.
    Not in the paper, which encodes what is drawn.

    Args:
        image_embeddings: `(images, dim)`, unit-norm, from the mining pass.
        text_embeddings: `(texts, dim)`, unit-norm, from the mining pass.
        hard_text_index: Integers `(images, texts_per_image)`, the hardest texts of each image. −1 stands where there is none.
        hard_image_index: Integers `(texts, images_per_text)`, the hardest images of each text. −1 stands where there is none.
        text_image_id: int64 `(texts,)`, the image that each text belongs to.
        coupled_ranks: Draw one rank for both text and image, as published. False: draw two, which gives more combinations. A
            pair for which no text was mined draws any of its images.
        seed: Another seed gives other draws. One number for the whole run.
        caption_id: int64 `(texts,)`, the number of the caption of each text. Default: captions are not compared.
    """

    def __init__(
        self,
        image_embeddings: Tensor,
        text_embeddings: Tensor,
        hard_text_index: Tensor,
        hard_image_index: Tensor,
        text_image_id: Tensor,
        *,
        coupled_ranks: bool = True,
        seed: int = 0,
        caption_id: Tensor | None = None,
    ) -> None:
        device = image_embeddings.device
        self.image_embeddings, self.text_embeddings = image_embeddings, text_embeddings
        self.hard_text_index, self.hard_image_index = hard_text_index.to(device), hard_image_index.to(device)
        self.text_image_id = text_image_id.to(device)
        self.texts_of = TextsOfImages(self.text_image_id, len(image_embeddings))
        self.coupled_ranks, self.seed = coupled_ranks, seed
        self.caption_id = None if caption_id is None else caption_id.to(device)

    def draw(self, image_id: Tensor, text_id: Tensor, epoch: int) -> HardNegatives:
        """Draw a text and an image for each pair of a batch. The host waits for nothing.

        Args:
            image_id: int64 `(pairs,)`, the image of each pair of the batch.
            text_id: int64 `(pairs,)`, the text of each pair of the batch.
            epoch: The current epoch. Each epoch has draws of its own.
        """
        first, second, third = (uniform(text_id, self.seed, epoch, number) for number in range(3))  # (pairs,) each
        rows = self.hard_text_index[image_id], self.hard_image_index[text_id]  # (pairs, places) each
        mined_text, mined_image = draw_from_rows(*rows, first, second, coupled_ranks=self.coupled_ranks)
        has_text, has_image = mined_text >= 0, mined_image >= 0
        # Shapes must not depend on the data, or the host would wait: a pair with nothing mined takes the embeddings of id 0,
        # and its id −1 tells the loss to skip them.
        mined_text, mined_image = mined_text.clamp_min(0), mined_image.clamp_min(0)
        image_of_text = self.text_image_id[mined_text]
        text_of_image = self.texts_of.text_id(mined_image, (third * self.texts_of.count[mined_image]).long())
        return HardNegatives(
            text_embeddings=self.text_embeddings[mined_text],
            image_of_text_embeddings=self.image_embeddings[image_of_text],
            image_id_of_text=torch.where(has_text, image_of_text, -1),
            image_embeddings=self.image_embeddings[mined_image],
            text_of_image_embeddings=self.text_embeddings[text_of_image],
            image_id=torch.where(has_image, mined_image, -1),
            positive=self._positive(image_id, text_id),
            caption_id=self._captions(mined_text, has_text),
            caption_id_of_image=self._captions(text_of_image, has_image),
        )

    def _captions(self, text_id: Tensor, is_there: Tensor) -> Tensor | None:
        return None if self.caption_id is None else torch.where(is_there, self.caption_id[text_id], -1)

    def _positive(self, image_id: Tensor, text_id: Tensor) -> EmbeddingPairs:
        """Return the pairs of a batch as the mining pass embedded them."""
        # `fast_dev_run` mines some pairs of the set. The others have no negatives, so that any row stands in for them.
        image_row = image_id.clamp_max(len(self.image_embeddings) - 1)
        text_row = text_id.clamp_max(len(self.text_embeddings) - 1)
        return EmbeddingPairs(self.image_embeddings[image_row], self.text_embeddings[text_row], image_id, text_id)
