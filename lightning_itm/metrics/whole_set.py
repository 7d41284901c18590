"""A whole set of embeddings: each image and each text once, whatever pairs they came in."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class WholeSet:
    """Hold the embeddings of all images and of all texts, in the order of their ids.

    Args:
        image_embeddings: `(images, dim)`.
        image_id: int64 `(images,)`, rising.
        text_embeddings: `(texts, dim)`.
        text_id: int64 `(texts,)`, rising.
        text_image_id: int64 `(texts,)`, the image that each text belongs to.
        text_row: int64 `(texts,)`, the pair that each text was taken from.
    """

    image_embeddings: Tensor
    image_id: Tensor
    text_embeddings: Tensor
    text_id: Tensor
    text_image_id: Tensor
    text_row: Tensor


def whole_set(image_embeddings: Tensor, text_embeddings: Tensor, image_id: Tensor, text_id: Tensor) -> WholeSet:
    """Take each image and each text of some pairs once, by its id.

    Args:
        image_embeddings: `(pairs, dim)`.
        text_embeddings: `(pairs, dim)`.
        image_id: int64 `(pairs,)`.
        text_id: int64 `(pairs,)`.

    Raises:
        ValueError: if one id stands for two different images or texts, or if an embedding is not finite.
    """
    image, unique_image_id, _, _ = _first_of_each("image_id", image_embeddings, image_id)
    text, unique_text_id, row, group = _first_of_each("text_id", text_embeddings, text_id)
    _check_finite("image", image, unique_image_id)
    _check_finite("text", text, unique_text_id)
    text_image_id = image_id[row]  # (texts,): the image of the first row of each text
    if bool((other := text_image_id[group] != image_id).any()):
        raise ValueError(
            f"Expected every text to belong to one image, got two for text_id {int(text_id[other][0])}. "
            "Number equal texts of different images separately."
        )
    return WholeSet(image, unique_image_id, text, unique_text_id, text_image_id, row)


def _first_of_each(name: str, embeddings: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keep the first row of each id.

    Returns:
        The embeddings `(ids, dim)` in the order of the ids, the ids, the row each came from, and for every row of the input
        `(rows,)` the index of its id.
    """
    unique, group = ids.unique(return_inverse=True)
    rows = torch.arange(len(ids), device=ids.device)
    row = torch.full_like(unique, len(ids)).scatter_reduce(0, group, rows, "amin")  # (ids,): the first row of each
    first = embeddings[row]
    again = (row[group] != rows).nonzero().squeeze(1)  # (repeated rows,)
    cosine = torch.nn.functional.cosine_similarity(embeddings[again].float(), first[group[again]].float(), dim=1)
    cosine = cosine.masked_fill((embeddings[again] == first[group[again]]).all(dim=1), 1)  # zeros have no direction
    if bool((cosine < _SAME).any()):
        bad = int(ids[again[cosine.argmin()]])
        raise ValueError(
            f"Expected one embedding for each `{name}`, got two that differ (cosine {float(cosine.min()):.2f}) for {name} "
            f"{bad}. Give every image and every text a number of its own; a repeated number is counted once."
        )
    return first, unique, row, group


def _check_finite(kind: str, embeddings: Tensor, ids: Tensor) -> None:
    bad = ids[~embeddings.isfinite().all(dim=1)].tolist()
    if bad:  # one such text would be a wrong result for every image, and recall would be 0 for no reason that is seen
        shown = ", ".join(map(str, bad[:_NUM_SHOWN])) + (", …" if len(bad) > _NUM_SHOWN else "")
        raise ValueError(
            f"Expected `{kind}_embeddings` to be finite, got NaN or infinity in {len(bad)} of {len(ids)} for {kind}_id "
            f"{shown}. Look at these inputs if they are few. If they are many, the {kind} tower has diverged: lower the "
            "learning rate, clip gradients, or use bfloat16 in place of float16."
        )


_NUM_SHOWN = 5
_SAME = 0.9  # the same input twice, in bfloat16 and in another batch, is above 0.99
