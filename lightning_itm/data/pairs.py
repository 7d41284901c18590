"""Image-text pairs by number: many texts an image, images in whatever form they come."""

import copy
import csv
import json
import warnings
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lightning_itm.data.image import ImageSource, UnreadableImageError, check_sources, open_rgb, to_tensor
from lightning_itm.data.shards.tar import IMAGE_ENDINGS


class ImageTextPairs(Dataset[dict[str, Any]]):
    """Image-text pairs with random access. One item is one *text* with its image.

    Args:
        images: One entry an image: a path, the bytes of an image file, a PIL image, or a uint8 array `(height, width)`
            or `(height, width, channels)`. Transparent pixels become white, as a browser shows them.
        texts: One text an image, or one list of texts an image, or, with ``text_image_id``, one text an entry.
        text_image_id: The image that each text belongs to, where ``texts`` is flat.
        transform: Turns a PIL image into what the image tower takes, in training. Default: a float tensor
            `(3, height, width)` in [0, 1].
        eval_transform: The same without augmentation, for validation, test and mining. Default: ``transform``.
        tokenizer: Turns a list of one text into a tensor `(1, length)`, as open_clip's do. Default: texts stay strings.

    Raises:
        ValueError: No images; an image without text; texts and images that do not match in number; ids that are not
            dense; the same path twice.
        TypeError: An image of a kind that can't be read; a text that is no string.

    Example:
        >>> red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
        >>> pairs = ImageTextPairs([red, blue], [["red", "a red square"], ["blue"]])
        >>> len(pairs), pairs[1]["text"], pairs[1]["image_id"], pairs[2]["image_id"]
        (3, 'a red square', 0, 1)
    """

    def __init__(
        self,
        images: Sequence[ImageSource],
        texts: Sequence[str] | Sequence[Sequence[str]],
        *,
        text_image_id: Sequence[int] | None = None,
        transform: Callable[[Image.Image], Any] | None = None,
        eval_transform: Callable[[Image.Image], Any] | None = None,
        tokenizer: Callable[[list[str]], Tensor] | None = None,
    ) -> None:
        self.images: Sequence[Any] = list(images)  # by position: a pandas Series is indexed by its labels
        self.texts: Sequence[str]
        self.texts, self.text_image_id = flatten_texts(texts, text_image_id, len(self.images))
        self._set_up(transform, eval_transform, tokenizer)
        check_sources(self.images)

    def _set_up(
        self,
        transform: Callable[[Image.Image], Any] | None,
        eval_transform: Callable[[Image.Image], Any] | None,
        tokenizer: Callable[[list[str]], Tensor] | None,
    ) -> None:
        self.transform = transform or to_tensor
        self.eval_transform = eval_transform or self.transform
        self.tokenizer = tokenizer
        self.is_evaluation = False
        # Shared: workers count, the main process sees it.
        self.num_replaced = torch.zeros((), dtype=torch.int64).share_memory_()

    @classmethod
    def from_karpathy(
        cls,
        path: str | PathLike[str],
        image_root: str | PathLike[str],
        split: str | Sequence[str] = "train",
        **kwargs: Any,
    ) -> "ImageTextPairs":
        """Read a Karpathy split (``dataset_flickr8k.json``, ``dataset_flickr30k.json``, ``dataset_coco.json``).

        Args:
            path: The JSON file.
            image_root: The folder of the images; COCO's ``filepath`` is looked up below it.
            split: ``"train"`` takes ``restval`` in, as published results on COCO do; ``["train"]`` does not.
            **kwargs: As for the class: ``transform``, ``eval_transform``, ``tokenizer``.

        Raises:
            ValueError: No image has that split.
            FileNotFoundError: The first image is not there.

        References:
            Karpathy and Fei-Fei, *Deep Visual-Semantic Alignments for Generating Image Descriptions*, CVPR 2015.
        """
        entries = json.loads(Path(path).read_text(encoding="utf-8"))["images"]
        wanted = {"train", "restval"} if split == "train" else {split} if isinstance(split, str) else set(split)
        chosen = [entry for entry in entries if entry["split"] in wanted]
        if not chosen:
            there = sorted({entry["split"] for entry in entries})
            raise ValueError(f"Expected `split` to be one of {there}, the splits of {path}, got {split!r}.")
        images = [Path(image_root, entry.get("filepath", ""), entry["filename"]) for entry in chosen]
        _check_first(images, image_root)
        return cls(images, [[sentence["raw"] for sentence in entry["sentences"]] for entry in chosen], **kwargs)

    @classmethod
    def from_csv(
        cls,
        path: str | PathLike[str],
        image_root: str | PathLike[str] = ".",
        *,
        image_column: str = "image",
        text_column: str = "text",
        delimiter: str = ",",
        **kwargs: Any,
    ) -> "ImageTextPairs":
        r"""Read a table with a header, one pair a row; rows with the same image share it.

        Args:
            path: The file.
            image_root: The folder that image paths start from.
            image_column: The column of image paths.
            text_column: The column of texts.
            delimiter: ``"\t"`` for the TSV files that open_clip trains on (with its columns ``filepath`` and ``title``).
            **kwargs: As for the class.

        Raises:
            ValueError: A column is missing, or the table is empty.
            FileNotFoundError: The first image is not there.
        """
        with open(path, newline="", encoding="utf-8-sig") as file:  # Excel begins with a byte-order mark
            rows = list(csv.DictReader(file, delimiter=delimiter))
        return cls._from_rows(rows, path, image_root, image_column, text_column, **kwargs)

    @classmethod
    def from_jsonl(
        cls,
        path: str | PathLike[str],
        image_root: str | PathLike[str] = ".",
        *,
        image_column: str = "image",
        text_column: str = "text",
        **kwargs: Any,
    ) -> "ImageTextPairs":
        """Read one JSON object a line; its text is a string or a list of strings. Else as :meth:`from_csv`."""
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
        return cls._from_rows(rows, path, image_root, image_column, text_column, **kwargs)

    @classmethod
    def from_folder(cls, folder: str | PathLike[str], **kwargs: Any) -> "ImageTextPairs":
        """Read a folder of images, each with a ``.txt`` of the same name beside it, one text a line; subfolders too.

        Args:
            folder: Where they are; in the order of their names.
            **kwargs: As for the class.

        Raises:
            FileNotFoundError: An image without a ``.txt``, or no image.
        """
        endings = {f".{ending}" for ending in IMAGE_ENDINGS}
        images = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in endings)
        if not images:
            raise FileNotFoundError(f"Expected images ({', '.join(sorted(endings))}) in {folder}, found none.")
        lacking = [path for path in images if not path.with_suffix(".txt").is_file()]
        if lacking:
            raise FileNotFoundError(
                f"Expected {lacking[0].with_suffix('.txt')} beside {lacking[0].name}, found none ({len(lacking)} of "
                f"{len(images)} images have no text). Write it, or move the image elsewhere."
            )
        lines = [path.with_suffix(".txt").read_text(encoding="utf-8-sig").splitlines() for path in images]
        return cls(images, [[line for line in of_image if line.strip()] for of_image in lines], **kwargs)

    @classmethod
    def _from_rows(
        cls,
        rows: list[dict[str, Any]],
        path: str | PathLike[str],
        image_root: str | PathLike[str],
        image_column: str,
        text_column: str,
        **kwargs: Any,
    ) -> "ImageTextPairs":
        texts_of_image: dict[str, list[str]] = {}
        for number, row in enumerate(rows, 1):
            if row.get(image_column) is None or row.get(text_column) is None:
                raise ValueError(
                    f"Expected row {number} of {path} to have {image_column!r} and {text_column!r}, got the columns "
                    f"{list(row)}. Name yours with `image_column` and `text_column`."
                )
            texts = row[text_column]
            texts_of_image.setdefault(row[image_column], []).extend([texts] if isinstance(texts, str) else texts)
        images = [Path(image_root, image) for image in texts_of_image]
        _check_first(images, image_root)
        return cls(images, list(texts_of_image.values()), **kwargs)

    def evaluation(self) -> "ImageTextPairs":
        """Return a view of the same pairs with ``eval_transform``; what can't be read is an error there."""
        view = copy.copy(self)
        view.is_evaluation = True
        return view

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Expected an index below {len(self)}, the number of pairs, got {index}.")
        if self.is_evaluation:
            return self._load_or_raise(index % len(self))
        for text_id in range(index, index + len(self)):
            try:
                return self._load(text_id % len(self))
            except UnreadablePairError as error:
                self.report(error)
        raise RuntimeError(f"None of the {len(self)} pairs can be read. See the warning above for the first of them.")

    def load_image(self, image_id: int) -> Any:
        """Return one image, transformed as for training, or for evaluation in a view of :meth:`evaluation`.

        Raises:
            UnreadablePairError: It does not open.
        """
        return self._open(image_id, self.images[image_id])

    def _open(self, image_id: int, source: ImageSource) -> Any:
        try:
            image = open_rgb(source)
        except UnreadableImageError as error:
            raise UnreadablePairError(f"Image {image_id}: {error}") from error
        return (self.eval_transform if self.is_evaluation else self.transform)(image)

    def load_text(self, text_id: int) -> Any:
        """Return one text, tokenised.

        Raises:
            UnreadablePairError: It is empty.
        """
        text = self.texts[text_id]
        if not text.strip():
            raise UnreadablePairError(f"Text {text_id}, of image {int(self.text_image_id[text_id])}, is empty")
        return self.tokenizer([text])[0] if self.tokenizer else text

    def _load(self, text_id: int) -> dict[str, Any]:
        image_id, text = int(self.text_image_id[text_id]), self.load_text(text_id)
        return {"image": self.load_image(image_id), "text": text, "image_id": image_id, "text_id": text_id}

    def _load_or_raise(self, text_id: int) -> dict[str, Any]:
        try:
            return self._load(text_id)
        except UnreadablePairError as error:
            raise RuntimeError(
                f"{error}. In evaluation nothing is replaced, because the result would be of another set. Repair the pair, "
                "or leave the image and its texts out."
            ) from error

    def report(self, error: Exception) -> None:
        """Count a pair that can't be used; warn at the first."""
        self.num_replaced += 1
        if int(self.num_replaced) == 1:
            warnings.warn(
                f"{error}. Another pair takes its place; further ones are counted in "
                "`ImageTextPairs.num_replaced` and not reported.",
                stacklevel=3,
            )


class UnreadablePairError(RuntimeError):
    """A pair that can't be used: its image does not open, or its text is empty."""


def flatten_texts(
    texts: Sequence[str] | Sequence[Sequence[str]], text_image_id: Sequence[int] | None, num_images: int
) -> tuple[list[str], Tensor]:
    """Return the texts one after the other, and the image of each.

    Raises:
        ValueError: They do not match the images in number; ids that are not dense.
        TypeError: A text that is no string.
    """
    if num_images == 0:
        raise ValueError("Expected at least one image, got none.")
    texts = list(texts)
    if text_image_id is None:
        if len(texts) != num_images:
            raise ValueError(
                f"Expected one text, or one list of texts, for each of the {num_images} images, got {len(texts)}. "
                "Give `text_image_id` if the texts are a flat list."
            )
        lists = [list(entry) if isinstance(entry, list | tuple) else [entry] for entry in texts]
        empty = [image_id for image_id, entry in enumerate(lists) if not entry]
        if empty:
            raise ValueError(
                f"Expected every image to have a text, got an empty list for image {empty[0]} "
                f"({len(empty)} of {num_images}). Leave out images without a text."
            )
        flat = _check_strings([text for entry in lists for text in entry])
        return flat, torch.repeat_interleave(torch.tensor([len(entry) for entry in lists]))
    ids = torch.as_tensor(list(text_image_id), dtype=torch.int64)
    if len(ids) != len(texts):
        raise ValueError(f"Expected one `text_image_id` for each of the {len(texts)} texts, got {len(ids)}.")
    if not torch.equal(ids.unique(), torch.arange(num_images)):
        raise ValueError(
            f"Expected `text_image_id` to be dense: every number from 0 to {num_images - 1}, the last image, at least "
            f"once, and no other. Got {ids.unique().numel()} numbers from {int(ids.min())} to {int(ids.max())}. "
            "Leave out images without a text, and number the rest from 0."
        )
    return _check_strings(texts), ids


def _check_strings(texts: Sequence[Any]) -> list[str]:
    for text_id, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"Expected every text to be a string, got {text!r} for text {text_id}. Leave it out, or fill it in."
            )
    return list(texts)


def _check_first(images: list[Path], image_root: str | PathLike[str]) -> None:
    if images and not images[0].is_file():
        raise FileNotFoundError(
            f"Expected the first image at {images[0]}, found none. Is `image_root` {image_root} right?"
        )
