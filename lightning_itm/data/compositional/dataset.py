"""Images with a right and a wrong caption each, as SugarCrepe has them."""

from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from lightning_itm.data.batch import collate_pairs
from lightning_itm.data.image import ImageSource
from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.data.readers.captions import shorten
from lightning_itm.data.readers.text_files import load_json, read_text

KEYS = ("filename", "caption", "negative_caption")


class CompositionalDataset(Dataset[dict[str, Any]]):
    """Read images with a right caption and a wrong one that is nearly the same, such as "a dog on a cat" of "a cat on a dog".

    A model that reads captions as bags of words can't tell them apart. It is for evaluation only: validate with it, and
    :class:`~lightning_itm.metrics.CompositionalAccuracy` is logged for each category.

    Args:
        images: One image per item, as :class:`~lightning_itm.ImageTextDataset` takes them. A path may come several times.
        captions: The right caption of each item.
        negative_captions: The wrong caption of each item.
        categories: The category of each item, such as ``"swap_obj"``. Default: one category, ``"all"``.
        **kwargs: Options of :class:`~lightning_itm.ImageTextDataset`, such as ``transform`` and ``tokenizer``.

    Raises:
        ValueError: if there are no items, if the lists differ in length, or if both captions of an item are equal.
        FileNotFoundError: if images are missing.

    Example:
        >>> from PIL import Image
        >>> from lightning_itm.data import CompositionalDataset
        >>> items = CompositionalDataset([Image.new("RGB", (8, 8))], ["a cat on a dog"], ["a dog on a cat"])
        >>> items[0]["text"], items[0]["negative_text"]
        ('a cat on a dog', 'a dog on a cat')

    References:
        Hsieh et al., *SugarCrepe: Fixing Hackable Benchmarks for Vision-Language Compositionality*, NeurIPS 2023,
        arXiv 2306.14610.
    """

    def __init__(
        self,
        images: Sequence[ImageSource],
        captions: Sequence[str],
        negative_captions: Sequence[str],
        categories: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        categories = ["all"] * len(images) if categories is None else categories
        sizes = {"images": len(images), "captions": len(captions)}
        sizes |= {"negative_captions": len(negative_captions), "categories": len(categories)}
        if len(set(sizes.values())) > 1 or not sizes["images"]:
            raise ValueError(f"Expected one entry per item in each list, and at least one item, got {sizes}.")
        for number, (right, wrong) in enumerate(zip(captions, negative_captions, strict=True)):
            if not isinstance(wrong, str) or not wrong.strip() or right == wrong:
                raise ValueError(
                    f"Expected the negative caption of item {number} to be a text, and another one than the caption, got "
                    f"{wrong!r} beside {right!r}. Leave the item out."
                )
        distinct = {_name(image): image for image in images}
        number_of = {name: number for number, name in enumerate(distinct)}
        # Captions of several items may be equal, and none of them is a negative of another.
        options = {"text_image_id": [number_of[_name(image)] for image in images], "equal_captions": "keep", **kwargs}
        self.pairs = ImageTextDataset(list(distinct.values()), captions, **options).evaluation()
        self.negative_captions = list(negative_captions)
        self.names = list(dict.fromkeys(categories))
        """The categories, in the order in which they come first."""
        self.category = [self.names.index(category) for category in categories]

    @classmethod
    def from_json(
        cls,
        source: str | PathLike[str] | Sequence[str | PathLike[str]],
        image_root: str | PathLike[str],
        *,
        encoding: str | None = None,
        **kwargs: Any,
    ) -> "CompositionalDataset":
        """Read SugarCrepe's form: one JSON file per category, a list or a dict of objects with three texts.

        An object is ``{"filename": "1.jpg", "caption": "a cat on a dog", "negative_caption": "a dog on a cat"}``. The name of
        a file, without ``.json``, is that of the category.

        Args:
            source: A JSON file, a list of such files, or a folder of them.
            image_root: The folder of the images.
            encoding: The encoding of the files. Default: UTF-8, or UTF-16 if a file begins with its mark.
            **kwargs: Options of :class:`~lightning_itm.ImageTextDataset`, such as ``transform`` and ``tokenizer``.

        Raises:
            ValueError: if a file has another form, or holds no item.
            FileNotFoundError: if there is no such file, or if images are missing.
        """
        columns: list[list[str]] = [[], [], [], []]
        for path in _json_files(source):
            for item in _items(path, encoding):
                for column, value in zip(columns, (*item, path.stem), strict=True):
                    column.append(value)
        names, captions, negative_captions, categories = columns
        images = [Path(image_root, name) for name in names]
        return cls(images, captions, negative_captions, categories, **kwargs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.pairs[index]  # an IndexError beyond the end, and an error for what can't be read
        negative = self.pairs._encode_text(self.negative_captions[index])
        return {**sample, "negative_text": negative, "category": self.category[index]}

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Stack samples into a batch, which has the names of all categories, too."""
        return {**collate_pairs(samples), "category_names": self.names}


def _name(image: ImageSource) -> Any:
    """Return what tells an image from others: its path, or itself."""
    return fspath(image) if isinstance(image, str | PathLike) else id(image)


def _json_files(source: str | PathLike[str] | Sequence[str | PathLike[str]]) -> list[Path]:
    if not isinstance(source, str | PathLike):
        return [Path(path) for path in source]
    path = Path(source)
    found = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not found:
        raise FileNotFoundError(f"Expected .json files in {path}, one per category, found none.")
    return found


def _items(path: Path, encoding: str | None) -> list[tuple[str, str, str]]:
    content = load_json(read_text(path, encoding), fspath(path))
    entries = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"Expected {path} to hold a list or a dict of objects, got {shorten(content)}.")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in KEYS):
            raise ValueError(
                f"Expected entry {number} of {path} to be an object with the texts {', '.join(map(repr, KEYS))}, got "
                f"{shorten(entry)}."
            )
    return [(entry["filename"], entry["caption"], entry["negative_caption"]) for entry in entries]
