"""Mined negatives as embeddings, drawn on the device."""

import torch
from torch import Tensor

from lightning_itm.embeddings import HardNegatives
from lightning_itm.randomness import uniform


class EmbeddedNegatives:
    """Negatives as embeddings of the mining pass, drawn on the device: a draw is a function of (seed, epoch, text id).

    Args:
        image_embeddings: `(images, dim)`, unit-norm.
        text_embeddings: `(texts, dim)`, unit-norm.
        hard_text_index: The hardest texts of each image, −1 where there is none.
        hard_image_index: The hardest images of each text, likewise.
        text_image_id: The image of each text.
        coupled_ranks: One draw for both.
        seed: Of the draws.
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
    ) -> None:
        device = image_embeddings.device
        self.image_embeddings, self.text_embeddings = image_embeddings, text_embeddings
        self.hard_text_index, self.hard_image_index = hard_text_index.to(device), hard_image_index.to(device)
        self.text_image_id = text_image_id.to(device)
        self.order = self.text_image_id.argsort(stable=True)
        self.count = torch.bincount(self.text_image_id, minlength=len(image_embeddings))
        self.start = self.count.cumsum(0) - self.count
        self.coupled_ranks, self.seed = coupled_ranks, seed

    def draw(self, image_id: Tensor, text_id: Tensor, epoch: int) -> HardNegatives:
        """Draw a text and an image for each pair of a batch; the host waits for nothing."""
        texts, images = self.hard_text_index[image_id], self.hard_image_index[text_id]
        num_texts, num_images = (texts >= 0).sum(dim=1), (images >= 0).sum(dim=1)
        first, second, third = (uniform(text_id, self.seed, epoch, number) for number in range(3))
        place = (first * num_texts).long()
        if self.coupled_ranks:
            image_place = torch.minimum(place * images.shape[1] // texts.shape[1], num_images - 1)
        else:
            image_place = (second * num_images).long()
        hard_text = texts.gather(1, place[:, None]).squeeze(1).long()
        hard_image = images.gather(1, image_place.clamp_min(0)[:, None]).squeeze(1).long()
        text_there, image_there = hard_text >= 0, hard_image >= 0
        hard_text, hard_image = hard_text.clamp_min(0), hard_image.clamp_min(0)
        of_text = self.text_image_id[hard_text]
        of_image = self.order[self.start[hard_image] + (third * self.count[hard_image]).long()]
        return HardNegatives(
            text_embeddings=self.text_embeddings[hard_text],
            image_of_text_embeddings=self.image_embeddings[of_text],
            image_id_of_text=torch.where(text_there, of_text, -1),
            image_embeddings=self.image_embeddings[hard_image],
            text_of_image_embeddings=self.text_embeddings[of_image],
            image_id=torch.where(image_there, hard_image, -1),
        )
