"""The pairs of a set and their embeddings, and which of them can be mined."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_itm.captions import captions_of_images


class ReadablePairs:
    """Say which images and texts of a set can be mined, and which captions they have. The embeddings are the subclasses'."""

    text_image_id: Tensor
    image_is_valid: Tensor
    text_is_valid: Tensor
    caption_id: Tensor | None

    def _leave_out_lonely(self) -> None:
        # What is mined is a pair: a text comes with its image, and an image with one of its texts.
        self.text_is_valid = self.text_is_valid & self.image_is_valid[self.text_image_id]
        num_readable = torch.bincount(self.text_image_id[self.text_is_valid], minlength=len(self.image_is_valid))
        self.image_is_valid = num_readable > 0  # (images,)

    def captions(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the captions of each image, `(images, most)`, filled up with −1, and that of each text, `(texts, 1)`."""
        if self.caption_id is None:
            return None, None
        of_image = captions_of_images(self.caption_id, self.text_image_id, len(self.image_is_valid))
        return of_image, self.caption_id[:, None]


@dataclass
class EncodedPairs(ReadablePairs):
    """Hold the embeddings of a whole set, in the order of the ids.

    Args:
        image_embeddings: `(images, dim)`, unit-norm.
        text_embeddings: `(texts, dim)`, unit-norm.
        text_image_id: int64 `(texts,)`, the image that each text belongs to.
        image_is_valid: bool `(images,)`, whether the image could be read. Afterwards false also where none of its texts could.
        text_is_valid: bool `(texts,)`, whether the text could be read. Afterwards false also where its image could not.
        caption_id: int64 `(texts,)`, the number of the caption of each text. Default: captions are not compared.
    """

    image_embeddings: Tensor
    text_embeddings: Tensor
    text_image_id: Tensor
    image_is_valid: Tensor
    text_is_valid: Tensor
    caption_id: Tensor | None = None

    def __post_init__(self) -> None:
        self._leave_out_lonely()

    def positive(self) -> tuple[Tensor, Tensor]:
        """Return the similarity of the matching pairs.

        Returns:
            For each image the mean over its valid texts, `(images,)`, and for each text that with its image, `(texts,)`.
        """
        of_text = (self.image_embeddings[self.text_image_id] * self.text_embeddings).sum(dim=1)  # (texts,)
        return mean_of_texts(of_text, self.text_image_id, self.text_is_valid, len(self.image_embeddings)), of_text


def mean_of_texts(of_text: Tensor, text_image_id: Tensor, text_is_valid: Tensor, num_images: int) -> Tensor:
    """Return the mean of a number of each text over the valid texts of each image, `(images,)`. Without one it is 0."""
    of_valid = torch.where(text_is_valid, of_text, 0)
    of_image = of_text.new_zeros(num_images).index_add_(0, text_image_id, of_valid)  # (images,), a sum so far
    num_valid = torch.bincount(text_image_id, weights=text_is_valid.to(of_text.dtype), minlength=num_images)
    return of_image / num_valid.clamp_min(1).to(of_text.dtype)
