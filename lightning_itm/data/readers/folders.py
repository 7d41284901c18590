"""Read a folder of images with a ``.txt`` beside each."""

import warnings
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from lightning_itm.data.image import IMAGE_ENDINGS
from lightning_itm.data.readers.captions import CaptionsOfImages, ImagesAndTexts, captions_of_lines
from lightning_itm.data.readers.text_files import read_text


def read_folder(folder: str | PathLike[str], encoding: str | None = None) -> ImagesAndTexts:
    """Read a folder of images, each with a ``.txt`` of the same name beside it, one text per line.

    Files whose name begins with a dot are passed over, as macOS puts one beside each file that it copies.

    Raises:
        FileNotFoundError: if there is no image, or if an image has no ``.txt``.
        ValueError: if two images, or two texts, have the same name, if a text is in another encoding, or if all are empty.
    """
    files = sorted(path for path in Path(folder).rglob("*") if not path.name.startswith("."))
    images = _by_name(path for path in files if path.suffix.lower()[1:] in IMAGE_ENDINGS)
    texts = _by_name(path for path in files if path.suffix.lower() == ".txt")
    if not images:
        raise FileNotFoundError(f"Expected images ({', '.join(IMAGE_ENDINGS)}) in {folder}, found none.")
    lacking = [path for name, path in images.items() if name not in texts]
    if lacking:
        raise FileNotFoundError(
            f"Expected {lacking[0].with_suffix('.txt')} beside {lacking[0].name}, found none ({len(lacking)} of "
            f"{len(images)} images have no text). Write it, or move the image elsewhere."
        )
    found = CaptionsOfImages(folder, "")
    for name, image in images.items():
        found.add(image, captions_of_lines(read_text(texts[name], encoding)), str(texts[name]))
    alone = [path for name, path in texts.items() if name not in images]
    if alone:
        warnings.warn(
            f"{len(alone)} .txt files in {folder} are left out, because no image ({', '.join(IMAGE_ENDINGS)}) beside them has "
            f"their name. The first: {alone[0]}.",
            stacklevel=3,
        )
    return found.finish()


def _by_name(paths: Iterable[Path]) -> dict[Path, Path]:
    found: dict[Path, Path] = {}
    for path in paths:
        other = found.setdefault(path.with_suffix(""), path)
        if other is not path:
            raise ValueError(
                f"Expected one image and one .txt of each name, got {other} and {path.name}. Remove or rename one of them."
            )
    return found
