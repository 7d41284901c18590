"""Each image and each text once, as evaluation reads them, and the texts that belong to an image."""

import random
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.data.shards.stream import ShardStream
from lightning_itm.unreadable import load_or_other

Kind = Literal["image", "text"]
KINDS: tuple[Kind, ...] = ("image", "text")


class EvaluationItems(Dataset[dict[str, Any]]):
    """Read all images, or all texts, of a set by id, each as evaluation sees it.

    An input that can't be read is stood in for by another one that can. So batches keep their size and ids keep their place,
    and ``"image_is_valid"`` (or ``"text_is_valid"``) is false for it. Its embedding must not be used.

    Args:
        pairs: The set. It is read through its ``evaluation()``.
        kind: ``"image"`` to read the images, ``"text"`` to read the texts.
        num_items: How many to read, from id 0 on. Default: all. Smaller in a trial run.

    Raises:
        UnreadablePairError: if not one input can be read.

    Example:
        >>> from PIL import Image
        >>> from lightning_itm import ImageTextDataset
        >>> from lightning_itm.data import EvaluationItems
        >>> pairs = ImageTextDataset([Image.new("RGB", (8, 8))], [["", "a black square"]])
        >>> EvaluationItems(pairs, "text")[0]
        {'text': 'a black square', 'text_id': 0, 'text_is_valid': False}
    """

    def __init__(self, pairs: ImageTextDataset, kind: Kind, num_items: int | None = None) -> None:
        view = pairs.evaluation()
        self.kind = kind
        self.load = view.load_image if kind == "image" else view.load_text
        self.num_items = len(view.images if kind == "image" else view.texts) if num_items is None else num_items

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, index: int) -> dict[str, Any]:
        # Drawn by the index, and not from the streams of the run. Of a lost folder, all neighbours would be tried.
        draw = random.Random(index).randrange
        loaded, is_own = load_or_other(self.load, index, self.num_items, what=f"{self.kind}s", draw=draw)
        return {self.kind: loaded, f"{self.kind}_id": index, f"{self.kind}_is_valid": is_own}


class TextsOfImages:
    """Find the texts of an image among all texts.

    Args:
        text_image_id: The image that each text belongs to, int64 `(texts,)`.
        num_images: Number of images of the set.

    Attributes:
        order: int64 `(texts,)`, the ids of all texts, sorted by their image. The texts of one image stand side by side.
        start: int64 `(images,)`, where in ``order`` the texts of each image begin.
        count: int64 `(images,)`, how many texts each image has.

    Example:
        >>> import torch
        >>> from lightning_itm.data import TextsOfImages
        >>> texts = TextsOfImages(torch.tensor([1, 0, 1]), num_images=2)
        >>> texts.text_id(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
        tensor([1, 0, 2])
    """

    def __init__(self, text_image_id: Tensor, num_images: int) -> None:
        self.order = text_image_id.argsort(stable=True)  # stable: the texts of an image keep their own order
        self.count = torch.bincount(text_image_id, minlength=num_images)
        self.start = self.count.cumsum(0) - self.count

    def text_id(self, image_id: Tensor, index: Tensor) -> Tensor:
        """Return the id of the text number ``index`` of each image. Both have the same shape, and so has the result."""
        return self.order[self.start[image_id] + index]


def evaluation_view(dataset: Dataset[Any] | ShardStream) -> Dataset[Any]:
    """Return the same samples in the same order, as evaluation sees them, where the dataset can tell."""
    if isinstance(dataset, ShardStream):
        dataset = dataset.pairs  # the shards, which can be read by number
    if isinstance(dataset, ImageTextDataset):
        return dataset.evaluation()
    if isinstance(dataset, Subset):
        return Subset(evaluation_view(dataset.dataset), dataset.indices)
    if isinstance(dataset, ConcatDataset):
        return ConcatDataset([evaluation_view(part) for part in dataset.datasets])
    return dataset
