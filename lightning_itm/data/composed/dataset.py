"""A set that is made of images of other sets, with ids of its own."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lightning_itm.data.inputs.sources import check_sources
from lightning_itm.data.pairs import ImageTextDataset


class ComposedDataset(ImageTextDataset):
    """Read images of other sets, each with all of its texts. Each set keeps its own transforms and tokenizer.

    Args:
        parts: The sets that are read, of any kind whose images can be read at random.
        image_ids: For each set the ids of its images that are taken, int64 `(images,)`, in the order in which they come.

    Raises:
        TypeError: if a part is no :class:`~lightning_itm.ImageTextDataset`.
        ValueError: if there is no part, no image, a path that comes twice, a part whose shards are remote, or parts with
            different ``equal_captions``.
    """

    def __init__(self, parts: Sequence[ImageTextDataset], image_ids: Sequence[Tensor]) -> None:
        check_parts(parts)
        self.parts = list(parts)
        rows = [_texts_of(part, ids) for part, ids in zip(self.parts, image_ids, strict=True)]
        first_image = torch.tensor([0, *(len(ids) for ids in image_ids)]).cumsum(0)  # (parts + 1,)
        self.image_part, self.image_index = _concatenated(image_ids)
        self.text_part, self.text_index = _concatenated([text_ids for text_ids, _ in rows])
        self.images = ComposedSequence([part.images for part in parts], self.image_part, self.image_index)
        self.texts = ComposedSequence([part.texts for part in parts], self.text_part, self.text_index)
        self.text_image_id = torch.cat([owner + first for (_, owner), first in zip(rows, first_image, strict=False)])
        first, most = parts[0], max(part.unreadable.max_fraction for part in parts)
        self._set_up(first.transform, first.eval_transform, first.tokenizer, first.equal_captions, most)
        self.is_evaluation = all(part.is_evaluation for part in parts)
        if len(parts) > 1:
            check_sources([source for part in parts for source in _sources(part)])

    @property
    def num_cut(self) -> int:
        """Number of captions of all parts so far of which the tokenizer cut off the end."""
        return sum(part.num_cut for part in self.parts)

    def identity(self) -> dict[str, Any]:
        """Return what tells this set from another: its own texts and order, and the identity of each part."""
        if self._identity is None:
            identity = super().identity()
            # Images count by the sets that they come from. Which of them are taken, the texts and the owners say.
            names = [part.identity().get("image names", "") for part in self.parts]
            self._identity = {**identity, "image names": "+".join(names)}
        return self._identity

    def evaluation(self) -> "ComposedDataset":
        """Return a view of the same pairs with the ``eval_transform`` of each part."""
        view: Any = super().evaluation()
        view.parts = [part.evaluation() for part in self.parts]
        return cast("ComposedDataset", view)

    def load_image(self, image_id: int) -> Any:
        """Return one image, transformed as its own set does."""
        return self.parts[int(self.image_part[image_id])].load_image(int(self.image_index[image_id]))

    def load_text(self, text_id: int) -> Any:
        """Return one text, tokenised as its own set does."""
        return self.parts[int(self.text_part[text_id])].load_text(int(self.text_index[text_id]))


class ComposedSequence(Sequence[Any]):
    """Give entries of several sequences by one number. Nothing is copied.

    Args:
        parts: The sequences.
        part: Which sequence each entry is from, int64 `(entries,)`.
        position: Where it stands in that sequence, int64 `(entries,)`.
    """

    def __init__(self, parts: Sequence[Sequence[Any]], part: Tensor, position: Tensor) -> None:
        self.parts, self.part, self.position = parts, part, position

    def __len__(self) -> int:
        return len(self.position)

    def __iter__(self) -> Iterator[Any]:
        for part, position in zip(self.part.tolist(), self.position.tolist(), strict=True):  # faster than one by one
            yield self.parts[part][position]

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[other] for other in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(f"Expected an index below {len(self)}, got {number}.")
        return self.parts[int(self.part[number])][int(self.position[number])]


def check_parts(parts: Sequence[ImageTextDataset]) -> None:
    """Raise if sets can't be read as one: :class:`ComposedDataset` says when."""
    if not parts:
        raise ValueError("Expected at least one set to read, got none.")
    for part in parts:
        if not isinstance(part, ImageTextDataset):
            raise TypeError(
                f"Expected ImageTextDatasets, got {type(part).__name__}. Read other data into an ImageTextDataset."
            )
        if not getattr(part, "is_local", True):
            raise ValueError(
                "Expected sets whose images can be read at random, got remote shards. Copy them to a disk, or give the "
                "addresses of all shards to one ShardDataset."
            )
        if part.hard_captions is not None:
            raise ValueError(
                "Expected sets without `hard_captions`, which a joined or a split set does not draw, got one with them. Join "
                "or split the lists first, and make one set of the result."
            )
        if part.equal_captions != parts[0].equal_captions:
            raise ValueError(
                f"Expected all sets to have the same `equal_captions`, got {parts[0].equal_captions!r} and "
                f"{part.equal_captions!r}. Make both sets with one of them."
            )


def _sources(part: ImageTextDataset) -> Sequence[Any]:
    """Return the paths of a set, which must not be in another one as well. Nothing is decoded."""
    shards = getattr(getattr(part, "contents", None), "shards", None)
    if shards is not None:
        return cast("list[str]", shards)
    if isinstance(part.images, list):
        return part.images
    entries = (_stored(part.images, number) for number in range(len(part.images)))
    return [entry for entry in entries if entry is not None]


def _stored(images: Sequence[Any], number: int) -> Any:
    """Return an entry that lies in a list, None if reading it would open it."""
    if isinstance(images, ComposedSequence):
        return _stored(images.parts[int(images.part[number])], int(images.position[number]))
    return images[number] if isinstance(images, list) else None


def _texts_of(part: ImageTextDataset, image_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the texts of some images, `(texts,)`, and the position of the image of each."""
    position = torch.full((len(part.images),), -1)
    position[image_ids] = torch.arange(len(image_ids))
    owner = position[part.text_image_id]
    text_ids = (owner >= 0).nonzero().squeeze(1)
    return text_ids, owner[text_ids]


def _concatenated(ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the number of the part that each id is from, and the id."""
    return torch.repeat_interleave(torch.tensor([len(part) for part in ids])), torch.cat(list(ids))
