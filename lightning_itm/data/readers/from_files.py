"""The class methods of :class:`~lightning_itm.ImageTextDataset` that read files. Each is a reader and the constructor."""

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_itm.data.readers.folders import read_folder
from lightning_itm.data.readers.huggingface import read_huggingface
from lightning_itm.data.readers.json_files import read_karpathy_with_ids
from lightning_itm.data.readers.tables import read_jsonl, read_table

Pairs = TypeVar("Pairs", bound="FromFiles")


class FromFiles:
    """Read a set from files. The class is called with the images, their texts, and the options."""

    coco_image_id: list[int] | None = None
    """COCO's id of each image (``cocoid``), after :meth:`from_karpathy` of COCO. None elsewhere."""
    coco_caption_id: list[int] | None = None
    """COCO's id of each caption (``sentid``), likewise. See :func:`~lightning_itm.metrics.coco_ranking`."""

    if TYPE_CHECKING:

        def __init__(self, images: Any, texts: Any, **kwargs: Any) -> None: ...

    @classmethod
    def from_karpathy(
        cls: type[Pairs],
        path: str | PathLike[str],
        image_root: str | PathLike[str],
        split: str | Sequence[str] = "train",
        *,
        encoding: str | None = None,
        **kwargs: Any,
    ) -> Pairs:
        """Read a Karpathy split (``dataset_flickr8k.json``, ``dataset_flickr30k.json``, ``dataset_coco.json``).

        Args:
            path: The path of the JSON file.
            image_root: The folder of the images. COCO's ``filepath`` is looked up below it.
            split: The split to read, such as ``"val"``, or a list of splits. ``"train"`` takes ``restval`` in, as published
                results on COCO do. ``["train"]`` does not.
            encoding: The encoding of the file, such as ``"cp1252"``. Default: UTF-8, or UTF-16 if it begins with its mark.
            **kwargs: The options of the class, such as ``transform`` and ``tokenizer``.

        Returns:
            The set. Of COCO, ``coco_image_id`` and ``coco_caption_id`` are its own ids, for evaluations that ask for them.

        Raises:
            ValueError: if the file has another form, or if no image has that split.
            FileNotFoundError: if the first image does not exist.

        References:
            Karpathy and Fei-Fei, *Deep Visual-Semantic Alignments for Generating Image Descriptions*, CVPR 2015.
        """
        read, ids = read_karpathy_with_ids(path, image_root, split, encoding)
        pairs = cls(*read, **kwargs)
        pairs.coco_image_id, pairs.coco_caption_id = ids.image, ids.caption
        return pairs

    @classmethod
    def from_csv(
        cls: type[Pairs],
        path: str | PathLike[str],
        image_root: str | PathLike[str] = ".",
        *,
        image_column: str = "image",
        text_column: str = "text",
        delimiter: str | None = None,
        encoding: str | None = None,
        hard_captions: str | None = None,
        **kwargs: Any,
    ) -> Pairs:
        """Read a table with a header and one pair per row. Rows with the same image share it.

        Args:
            path: The path of the CSV file.
            image_root: The folder that image paths start from. Default: the current folder.
            image_column: The column that holds the image paths. In tables for open_clip it is ``filepath``.
            text_column: The column that holds the texts. In tables for open_clip it is ``title``.
            delimiter: The sign between two columns. Default: the comma, tab, ``|`` or semicolon by which the header has both
                columns.
            encoding: The encoding of the file, such as ``"cp1252"``. Default: UTF-8, or UTF-16 if it begins with its mark.
            hard_captions: The column of captions that are wrong for the image of their row, such as ``"hard_captions"``. A
                cell holds one plain text, or a JSON list of texts such as ``["a cat", "a cow"]``, or nothing. See
                :class:`~lightning_itm.ImageTextDataset`. Default: there are none.
            **kwargs: The options of the class, such as ``transform`` and ``tokenizer``.

        Raises:
            ValueError: if a column is missing, if a row has another number of cells than the header, if a quote is not closed,
                if the file is in another encoding, if no row has a text, or if a cell of ``hard_captions`` holds what is no
                text.
            FileNotFoundError: if the first image does not exist.
        """
        columns = image_column, text_column, delimiter, encoding, hard_captions
        images, texts, wrong = read_table(path, image_root, *columns)
        return cls(images, texts, **kwargs, **({} if wrong is None else {"hard_captions": wrong}))

    @classmethod
    def from_jsonl(
        cls: type[Pairs],
        path: str | PathLike[str],
        image_root: str | PathLike[str] = ".",
        *,
        image_column: str = "image",
        text_column: str = "text",
        encoding: str | None = None,
        hard_captions: str | None = None,
        **kwargs: Any,
    ) -> Pairs:
        """Read one JSON object per line. Its text is a string or a list of strings, and so are its ``hard_captions``.

        The rest is as in :meth:`from_csv`. Each text of a line has all hard captions of the line.
        """
        images, texts, wrong = read_jsonl(path, image_root, image_column, text_column, encoding, hard_captions)
        return cls(images, texts, **kwargs, **({} if wrong is None else {"hard_captions": wrong}))

    @classmethod
    def from_folder(
        cls: type[Pairs], folder: str | PathLike[str], *, encoding: str | None = None, **kwargs: Any
    ) -> Pairs:
        """Read a folder of images, each with a ``.txt`` of the same name beside it. Each line is a text.

        Args:
            folder: The folder. Its subfolders are read, too, all in the order of their names. Hidden files are not.
            encoding: The encoding of the texts, such as ``"cp1252"``. Default: UTF-8, or UTF-16 if one begins with its mark.
            **kwargs: The options of the class, such as ``transform`` and ``tokenizer``.

        Raises:
            FileNotFoundError: if there is no image, or if an image has no ``.txt``.
            ValueError: if two images have one name, or if a text is in another encoding.
        """
        return cls(*read_folder(folder, encoding), **kwargs)

    @classmethod
    def from_huggingface(
        cls: type[Pairs],
        dataset: Any,
        image: str = "image",
        captions: str = "sentences",
        *,
        caption_key: str | None = None,
        image_id: str | None = None,
        image_root: str | PathLike[str] = ".",
        hard_captions: str | None = None,
        **kwargs: Any,
    ) -> Pairs:
        """Read a data set of the Hugging Face library ``datasets``. An image is read when its pair is asked for.

        It needs ``pip install "lightning_itm[datasets]"``. Captions are read at once, and what is no text is left out with a
        warning. Decoding is as everywhere here: transparent pixels become white, and a broken image counts as unreadable.

        Args:
            dataset: A ``datasets.Dataset``, such as ``load_dataset(..., split="train")``.
            image: The column of the images: of the type ``datasets.Image``, bytes, or paths.
            captions: The column of the captions: a string, a list of strings, or a list of dicts with a string each.
            caption_key: The key of the caption, where captions are dicts. Default: the one of ``"raw"``, ``"caption"``,
                ``"text"`` and ``"sentence"`` that is there.
            image_id: The column that says which rows have the same image, such as ``"cocoid"``. Give it where a data set has
                one row per caption: else the captions of an image are negatives of it. Default: rows with the same path.
            image_root: The folder that paths start from. Default: the current folder.
            hard_captions: The column of captions that are wrong for the image of their row: a string, or a list of strings
                that may be empty. See :class:`~lightning_itm.ImageTextDataset`. Default: there are none.
            **kwargs: The options of the class, such as ``transform`` and ``tokenizer``.

        Raises:
            TypeError: if it is no ``datasets.Dataset``, such as a ``DatasetDict``, or if a column holds something else.
            ValueError: if a column is missing, if a row has no image, or if no image has a caption.
            ModuleNotFoundError: if ``datasets`` is not installed.

        Example:
            >>> from datasets import Dataset
            >>> from PIL import Image
            >>> from lightning_itm import ImageTextDataset
            >>> images = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
            >>> dataset = Dataset.from_dict({"image": images, "sentences": [["red", "a red square"], ["blue"]]})
            >>> pairs = ImageTextDataset.from_huggingface(dataset)
            >>> len(pairs), pairs[2]["text"], pairs[2]["image_id"]
            (3, 'blue', 1)
        """
        ways: Any = {"caption_key": caption_key, "image_id": image_id, "image_root": image_root}
        images, texts, wrong = read_huggingface(dataset, image, captions, hard_captions=hard_captions, **ways)
        return cls(images, texts, **kwargs, **({} if wrong is None else {"hard_captions": wrong}))
