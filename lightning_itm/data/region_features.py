"""Region features that were computed before, mapped from a file, with captions. ResidualVSE trains on them."""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lightning_itm.data.batch import Unpadded
from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.data.readers import flatten_texts
from lightning_itm.data.readers.text_files import read_text

SPECIAL = ("<pad>", "<start>", "<end>", "<unk>", "<mask>")


class Vocabulary:
    """Number the words of captions.

    Args:
        words: All words, the special ones first. :meth:`build` collects them from captions.

    Raises:
        ValueError: if the special words are not the first.

    Example:
        >>> from lightning_itm.data import Vocabulary
        >>> vocabulary = Vocabulary.build(["A dog runs.", "A dog."], min_count=2)
        >>> vocabulary.encode("a dog sleeps."), len(vocabulary)
        ([1, 5, 6, 3, 7, 2], 8)
    """

    def __init__(self, words: Sequence[str]) -> None:
        if tuple(words[: len(SPECIAL)]) != SPECIAL:
            raise ValueError(f"Expected the words to start with {SPECIAL}, got {tuple(words[: len(SPECIAL)])}.")
        self.words = list(words)
        self.id_of = {word: number for number, word in enumerate(self.words)}

    @classmethod
    def build(cls, texts: Iterable[str], min_count: int = 4) -> "Vocabulary":
        """Collect the words of ``texts`` that occur at least ``min_count`` times, in the order of their first occurrence."""
        counts = Counter(word for text in texts for word in split_words(text))
        return cls([*SPECIAL, *(word for word, count in counts.items() if count >= min_count)])

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Vocabulary":
        """Read what :meth:`save` wrote."""
        return cls(json.loads(Path(path).read_text(encoding="utf-8")))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the words as a JSON list."""
        Path(path).write_text(json.dumps(self.words, ensure_ascii=False), encoding="utf-8")

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str, changed: float = 0.0) -> list[int]:
        """Return word ids between start and end.

        Args:
            text: The caption, with any signs and capitals.
            changed: The fraction of words that are changed at random. Half of these are masked, a tenth is replaced by any
                word, and the others are dropped. Use 0.2 in training as published, and 0 in evaluation.
        """
        ids = [self.id_of.get(word, SPECIAL.index("<unk>")) for word in split_words(text)]
        if changed:
            ids = [new for word in ids for new in self._changed(word, changed)]
        return [SPECIAL.index("<start>"), *ids, SPECIAL.index("<end>")]

    def _changed(self, word: int, changed: float) -> list[int]:
        if random.random() >= changed:
            return [word]
        kind = random.random()
        if kind < 0.5:
            return [SPECIAL.index("<mask>")]
        return [random.randrange(len(SPECIAL), len(self))] if kind < 0.6 and len(self) > len(SPECIAL) else []


class RegionFeatureDataset(ImageTextDataset):
    """Read region features with captions, for :class:`~lightning_itm.ResidualVSE`. One item is one caption with its image.

    The features are mapped, not loaded. So a file of any size takes no more memory than the batches read from it. They come as
    float32, even if the file holds float16. In training, regions are dropped and words changed at random, as published. A
    loader of your own needs ``collate_fn=lightning_itm.data.collate_pairs``, which pads.

    Args:
        features: The path of a ``.npy`` file `(images, regions, dim)`, or such an array.
        texts: One caption per image, or one list of captions per image. With ``text_image_id``, a flat list of all captions.
        lengths: The number of regions of each image. Give it where some rows are padding. Default: all are regions.
        text_image_id: The image that each caption belongs to, such as ``[0, 0, 1]``. Give it where ``texts`` is a flat list.
        vocabulary: The words that have a number. Default: those that occur at least four times in ``texts``. Give a validation
            set the vocabulary of the training set.
        drop_regions: The fraction of regions that are dropped in training, 0.2 as published. One region always stays.
        change_words: The fraction of words that are changed in training, 0.2 as published. :meth:`Vocabulary.encode` says how.
        equal_captions: ``"exclude"`` or ``"keep"`` captions of several images, as :class:`~lightning_itm.ImageTextDataset`.

    Raises:
        ValueError: if features and captions do not match in number or the features have no three dimensions, or if a length is
            0 or more than there are regions.

    References:
        arXiv 2303.00181 (2023) and the code of arXiv 2011.04305, which draw alike.
    """

    def __init__(
        self,
        features: "str | PathLike[str] | np.ndarray[Any, Any] | FeatureRows",
        texts: Sequence[str] | Sequence[Sequence[str]],
        *,
        lengths: Sequence[int] | None = None,
        text_image_id: Sequence[int] | None = None,
        vocabulary: Vocabulary | None = None,
        drop_regions: float = 0.2,
        change_words: float = 0.2,
        equal_captions: Literal["exclude", "keep"] = "exclude",
    ) -> None:
        self.features = features if isinstance(features, FeatureRows) else FeatureRows(features)
        shape = self.features.shape
        if len(shape) != 3:
            raise ValueError(f"Expected features of the shape (images, regions, dim), got {shape}.")
        for name, value in (("drop_regions", drop_regions), ("change_words", change_words)):
            if not 0 <= value < 1:
                raise ValueError(f"Expected `{name}` to be in [0, 1), got {value}.")
        self.images = range(shape[0])  # by number: there is nothing to look at
        self.texts, self.text_image_id = flatten_texts(texts, text_image_id, shape[0])
        self.lengths = torch.full((shape[0],), shape[1]) if lengths is None else torch.as_tensor(lengths).long()
        if len(self.lengths) != shape[0]:
            raise ValueError(f"Expected one length for each of the {shape[0]} images, got {len(self.lengths)}.")
        if int(self.lengths.min()) < 1 or int(self.lengths.max()) > shape[1]:
            raise ValueError(
                f"Expected lengths from 1 to {shape[1]}, the regions of a row, got {int(self.lengths.min())} to "
                f"{int(self.lengths.max())}. Leave out images without regions."
            )
        self.vocabulary = Vocabulary.build(self.texts) if vocabulary is None else vocabulary
        self.drop_regions, self.change_words = drop_regions, change_words
        self._set_up(None, None, None, equal_captions, max_unreadable=1.0)  # no files that could be lost

    @classmethod
    def from_scan(
        cls, folder: str | PathLike[str], split: str = "train", *, captions_per_image: int = 5, **kwargs: Any
    ) -> "RegionFeatureDataset":
        """Read the layout in which the field's features are published: ``train_ims.npy`` and ``train_caps.txt``.

        There is one row per image or, as in the published validation and test files, one row per caption.

        Args:
            folder: The folder that holds both files.
            split: The first part of the file names, such as ``"train"``, ``"dev"`` or ``"test"``.
            captions_per_image: The number of lines in a row that belong to one image. Published sets have 5.
            **kwargs: The other arguments of the class, such as ``vocabulary``.

        Raises:
            FileNotFoundError: if one of the two files does not exist.
            ValueError: if rows and captions do not match in number.
        """
        images, captions = Path(folder, f"{split}_ims.npy"), Path(folder, f"{split}_caps.txt")
        for path in (images, captions):
            if not path.is_file():
                raise FileNotFoundError(
                    f"Expected {path}, found none. Is `folder` {folder} right, and `split` {split!r}?"
                )
        # Not `splitlines`, which takes signs within a caption for the end of a line.
        texts = read_text(captions).rstrip("\n").split("\n")
        rows = FeatureRows(images)
        repeats = captions_per_image if len(rows) == len(texts) and _is_repeated(rows, captions_per_image) else 1
        per_row = 1 if len(rows) == len(texts) and repeats == 1 else captions_per_image
        num_images = len(rows) // repeats
        if num_images * per_row != len(texts):
            raise ValueError(
                f"Expected {captions_per_image} captions an image, got {len(rows)} rows in {images.name} and "
                f"{len(texts)} lines in {captions.name}. Give `captions_per_image`, if it is another number."
            )
        grouped = [texts[start : start + per_row] for start in range(0, len(texts), per_row)]
        return cls(rows.every(repeats), grouped, **kwargs)

    def load_image(self, image_id: int) -> Unpadded:
        """Return the regions of an image, `(regions, dim)`."""
        regions = torch.from_numpy(self.features[image_id][: int(self.lengths[image_id])].astype(np.float32))
        if self.drop_regions and not self.is_evaluation:
            kept = torch.tensor([random.random() >= self.drop_regions for _ in range(len(regions))])  # (regions,)
            kept[random.randrange(len(regions))] = True  # an image without regions has no embedding
            regions = regions[kept]  # (kept regions, dim)
        return Unpadded(regions)

    def _encode_text(self, text: str) -> Unpadded:
        return Unpadded(torch.tensor(self.vocabulary.encode(text, 0.0 if self.is_evaluation else self.change_words)))


class FeatureRows:
    """Read rows of an array. One in a file is mapped, and each worker maps it anew.

    Args:
        source: The path of a ``.npy`` file, or an array.
        step: The distance between two rows that are taken. Default: all rows.
    """

    def __init__(self, source: "str | PathLike[str] | np.ndarray[Any, Any]", step: int = 1) -> None:
        if not isinstance(source, str | PathLike | np.ndarray):
            raise TypeError(
                f"Expected features as an array or the path of a .npy file, got {type(source).__name__}. Use `numpy.asarray`."
            )
        self.source = source if isinstance(source, np.ndarray) else Path(source)
        self.step = step
        self._map()

    def every(self, step: int) -> "FeatureRows":
        """Return these rows with a larger step, such as every fifth of them."""
        return FeatureRows(self.source, self.step * step)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of all rows."""
        return tuple(self.rows.shape)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> "np.ndarray[Any, Any]":
        return self.rows[index]  # type: ignore[no-any-return]

    def _map(self) -> None:
        array = self.source if isinstance(self.source, np.ndarray) else np.load(self.source, mmap_mode="r")
        self.rows: np.ndarray[Any, Any] = array[:: self.step]

    # A spawned worker gets the path and not the rows, which pickle would copy.
    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "step": self.step}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()


def split_words(text: str) -> list[str]:
    """Split into lower-case words and signs."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _is_repeated(rows: FeatureRows, number: int) -> bool:
    # Twenty images tell: features of two never agree in all bits.
    groups = range(0, min(len(rows), 20 * number), number)
    return len(rows) % number == 0 and all(
        np.array_equal(rows[start], rows[start + offset]) for start in groups for offset in range(1, number)
    )
