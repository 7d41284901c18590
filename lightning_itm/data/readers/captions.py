"""What counts as a caption, for every reader: texts are kept, and what is no text is left out, counted and named."""

import warnings
from os import PathLike
from pathlib import Path
from reprlib import Repr
from typing import Any

ImagesAndTexts = tuple[list[Path], list[list[str]]]
WithHardCaptions = tuple[list[Path], list[list[str]], list[list[str]] | None]
"""Images, the texts of each, and the wrong captions of each text, or None where they were not asked for."""

_REPR = Repr()
_REPR.maxstring = _REPR.maxother = 80  # signs; beyond them the middle is left out


def shorten(value: Any) -> str:
    """Return ``repr`` of a value for a message, with the middle of what is long left out."""
    return _REPR.repr(value)


def split_captions(value: Any) -> tuple[list[str], list[Any]]:
    """Split a value of a file into its captions and into what is no text. A list is several captions.

    A text is a string that is not blank and that UTF-8 can hold, which half of a surrogate pair is not. Anything else is no
    text: numbers, NaN, ``None``, dicts, lists within lists and empty lists.

    Example:
        >>> from lightning_itm.data.readers.captions import split_captions
        >>> split_captions(["a dog", "", 3]), split_captions({"en": "a dog"})
        ((['a dog'], ['', 3]), ([], [{'en': 'a dog'}]))
    """
    entries = value if isinstance(value, list | tuple) and value else [value]
    texts = [entry for entry in entries if _is_text(entry)]
    return texts, [] if len(texts) == len(entries) else [entry for entry in entries if not _is_text(entry)]


def captions_of_lines(content: str) -> list[str] | str:
    """Return the lines of a ``.txt``, each a caption. Blank lines only set others apart. If all are blank, return them."""
    # Not `splitlines`, which also splits at signs that stand within a caption.
    return [line for line in content.split("\n") if line.strip()] or content


class CaptionsOfImages:
    """Collect the captions of images as a reader finds them. Rows with the same image share it.

    Args:
        source: The file or folder that is read, for messages.
        image_root: The folder that image paths start from.
    """

    def __init__(self, source: str | PathLike[str], image_root: str | PathLike[str]) -> None:
        self.source, self.image_root = source, image_root
        self.captions: dict[Path, list[str]] = {}  # in the order in which each image comes first
        self.texts_of: dict[str | Path, list[str]] = {}  # the same lists, by what the file calls the image
        self.image_ids: dict[Path, Any] = {}  # what the file calls images and captions, where a reader asks for it
        self.caption_ids: dict[Path, list[Any]] = {}
        self.hard_captions: dict[Path, list[list[str]]] = {}  # those of each caption, where a reader asks for them
        self.num_hard_left_out = 0
        self.num_left_out = 0
        self.first_left_out = ""

    def add(self, image: Any, value: Any, where: str) -> int:
        """Take in what a file has as the captions of an image, and note what is no text.

        Args:
            image: The path of the image. It starts from ``image_root``.
            value: Whatever stands where a caption is expected.
            where: The place in the source, for messages. Such as ``"line 3"``.

        Returns:
            How many captions are kept.

        Raises:
            ValueError: if the path is no text.
        """
        if not isinstance(image, str | Path) or not str(image).strip():
            raise ValueError(
                f"Expected the image in {where} of {self.source} to be a path, got {shorten(image)}. Write one, or leave it "
                "out."
            )
        texts, others = split_captions(value)
        if image not in self.texts_of:  # two spellings of one path share a list; paths are slow to make and to compare
            self.texts_of[image] = self.captions.setdefault(Path(self.image_root, image), [])
        self.texts_of[image].extend(texts)
        if others and not self.num_left_out:
            self.first_left_out = f"{where}: {shorten(others[0])}"
        self.num_left_out += len(others)
        return len(texts)

    def add_ids(self, image: str | Path, image_id: Any, caption_ids: list[Any]) -> None:
        """Take in what a file calls an image and each of its captions that are kept, after :meth:`add`."""
        path = Path(self.image_root, image)
        self.image_ids.setdefault(path, image_id)
        self.caption_ids.setdefault(path, []).extend(caption_ids)

    def add_hard_captions(self, image: str | Path, num_captions: int, wrong: list[str]) -> None:
        """Take in the wrong captions of a row, after :meth:`add`. Each caption that is kept gets them."""
        self.hard_captions.setdefault(Path(self.image_root, image), []).extend([wrong] * num_captions)
        self.num_hard_left_out += 0 if num_captions else len(wrong)

    def hard_captions_of(self, images: list[Path]) -> list[list[str]]:
        """Return the wrong captions of each caption of these images."""
        return [wrong for image in images for wrong in self.hard_captions[image]]

    def add_row(self, row: Any, image_key: str, text_key: str, where: str) -> int:
        """Take in an object of a JSON file, with the path of an image and its captions. Return how many are kept.

        Raises:
            ValueError: if it is no object, or lacks one of the keys.
        """
        if not isinstance(row, dict) or image_key not in row or text_key not in row:
            got = f"the columns {list(row)}" if isinstance(row, dict) else shorten(row)
            raise ValueError(
                f"Expected {where} of {self.source} to be an object with {image_key!r} and {text_key!r}, got {got}. Name "
                "yours with `image_column` and `text_column`."
            )
        return self.add(row[image_key], row[text_key], where)

    def finish(self) -> ImagesAndTexts:
        """Return the images that have a caption, and the captions of each. Warn of what is left out.

        Raises:
            ValueError: if no image has a caption.
            FileNotFoundError: if the first image does not exist.
        """
        kept = {image: texts for image, texts in self.captions.items() if texts}
        left_out = (
            f"what is no text is left out as a caption, {self.num_left_out} times, first in {self.first_left_out}"
        )
        if not kept:
            what = f"; {left_out}" if self.num_left_out else ""
            raise ValueError(f"Expected at least one image with a caption in {self.source}, found none{what}.")
        # Only the first: a wrong `image_root` is seen at once, and looking for a million files takes minutes.
        first = next(iter(kept))
        if not first.is_file():
            raise FileNotFoundError(
                f"Expected the first image at {first}, found none. Is `image_root` {self.image_root} right?"
            )
        if self.num_left_out:
            hard = f" So are {self.num_hard_left_out} hard captions of such rows." if self.num_hard_left_out else ""
            warnings.warn(
                f"In {self.source}, {left_out}. So {len(self.captions) - len(kept)} of {len(self.captions)} images have no "
                f"caption and are left out, too.{hard}",
                stacklevel=4,  # past the reader and the classmethod: at the line that asked for the set
            )
        return list(kept), list(kept.values())


def _is_text(value: Any) -> bool:
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which no tokenizer and no file takes
        return False
    return True
