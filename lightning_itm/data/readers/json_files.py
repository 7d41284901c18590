"""Read the JSON files in which captions are published: Karpathy's splits, COCO's annotations, and the lists of BLIP."""

from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple

from lightning_itm.data.readers.captions import (
    CaptionsOfImages,
    ImagesAndTexts,
    WithHardCaptions,
    shorten,
    split_captions,
)
from lightning_itm.data.readers.hard_captions import check_name, hard_captions_of_row
from lightning_itm.data.readers.text_files import load_json, read_text


class CocoIds(NamedTuple):
    """Hold what COCO calls each image and each caption, in the order in which they are read."""

    image: list[int] | None = None
    """The ``cocoid`` of each image. None where the file has none, as that of Flickr30K."""
    caption: list[int] | None = None
    """The ``sentid`` of each caption."""


def read_json(
    path: str | PathLike[str],
    image_root: str | PathLike[str],
    split: str | Sequence[str],
    image_column: str,
    text_column: str,
    encoding: str | None = None,
    hard_captions: str | None = None,
) -> WithHardCaptions:
    """Read a JSON file, whose content tells its form. Only Karpathy's has splits, and only a list has hard captions.

    Returns:
        The images, the captions of each, and the hard captions of each caption, or None without ``hard_captions``.

    Raises:
        ValueError: if it has none of the forms, if no image has a caption, or if the form has no hard captions.
        FileNotFoundError: if the first image does not exist.
    """
    check_name(hard_captions)
    content, found = load_json(read_text(path, encoding), fspath(path)), CaptionsOfImages(path, image_root)
    if isinstance(content, list):
        _read_list(content, found, image_column, text_column, hard_captions)
    elif hard_captions is not None:
        raise ValueError(
            f"Expected {path} to be a list of objects with {hard_captions!r}, got another form, which has no hard captions. "
            "Write it as .jsonl, or give them to the constructor of ImageTextDataset."
        )
    elif isinstance(content, dict) and "annotations" in content:
        _read_coco(content, found)
    else:
        _read_karpathy(content, found, split)
    images, texts = found.finish()
    return images, texts, None if hard_captions is None else found.hard_captions_of(images)


def read_karpathy(
    path: str | PathLike[str],
    image_root: str | PathLike[str],
    split: str | Sequence[str],
    encoding: str | None = None,
) -> ImagesAndTexts:
    """Read a split of a Karpathy JSON. ``"train"`` takes ``restval`` in, and a list of splits takes those alone.

    Raises:
        ValueError: if the file has another form, if it has no such split, or if no image has a caption.
        FileNotFoundError: if the first image does not exist.
    """
    return read_karpathy_with_ids(path, image_root, split, encoding)[0]


def read_karpathy_with_ids(
    path: str | PathLike[str],
    image_root: str | PathLike[str],
    split: str | Sequence[str],
    encoding: str | None = None,
) -> tuple[ImagesAndTexts, CocoIds]:
    """Read a split of a Karpathy JSON as :func:`read_karpathy` does, and what COCO calls its images and captions."""
    found = CaptionsOfImages(path, image_root)
    _read_karpathy(load_json(read_text(path, encoding), fspath(path)), found, split)
    images, texts = found.finish()
    image_ids = [found.image_ids.get(image) for image in images]
    caption_ids = [name for image in images for name in found.caption_ids.get(image, [])]
    are_known = all(isinstance(name, int) for name in (*image_ids, *caption_ids))
    are_known &= len(caption_ids) == sum(map(len, texts))  # sentences of another form have none
    return (images, texts), CocoIds(image_ids, caption_ids) if are_known else CocoIds()  # type: ignore[arg-type]


def _read_list(
    content: list[Any], found: CaptionsOfImages, image_column: str, text_column: str, hard_captions: str | None
) -> None:
    """Read a list of objects such as ``{"image": "1.jpg", "caption": "a dog"}``, as BLIP and ALBEF have."""
    for number, row in enumerate(content, 1):
        # BLIP's name for it, where no other is asked for.
        is_blip = text_column == "text" and isinstance(row, dict) and "text" not in row and "caption" in row
        num_captions = found.add_row(row, image_column, "caption" if is_blip else text_column, f"entry {number}")
        if hard_captions is not None:
            wrong = hard_captions_of_row(row, hard_captions, f"entry {number} of {found.source}")
            found.add_hard_captions(row[image_column], num_captions, wrong)


def _read_coco(content: dict[str, Any], found: CaptionsOfImages) -> None:
    """Read ``captions_*.json`` of COCO: images by their id, and annotations that name the id of their image."""
    captions_of: dict[int | str, list[tuple[Any, str]]] = {}
    name_of: dict[int | str, Any] = {}
    for number, image in _entries(content, "images", ("id", "file_name"), found):
        if not _is_id(image["id"]) or image["id"] in name_of:
            raise ValueError(
                f"Expected every 'id' in 'images' of {found.source} to be a number that comes once, got "
                f"{shorten(image['id'])} in entry {number}."
            )
        name_of[image["id"]], captions_of[image["id"]] = image["file_name"], []
    for number, annotation in _entries(content, "annotations", ("image_id", "caption"), found):
        image_id = annotation["image_id"]
        if not _is_id(image_id) or image_id not in captions_of:
            raise ValueError(
                f"Expected the 'image_id' of annotation {number} of {found.source} to be one of 'images', got "
                f"{shorten(image_id)}. Leave the annotation out."
            )
        captions_of[image_id].append((annotation["caption"], f"annotation {number}"))
    for image_id, captions in captions_of.items():
        for caption, where in captions or [([], f"image {image_id}, which has no annotation")]:
            found.add(name_of[image_id], caption, where)


def _read_karpathy(content: Any, found: CaptionsOfImages, split: str | Sequence[str]) -> None:
    entries = _entries(content, "images", ("filename", "split", "sentences"), found)
    wanted = {"train", "restval"} if split == "train" else {split} if isinstance(split, str) else set(split)
    there = sorted({entry["split"] for _, entry in entries if isinstance(entry["split"], str)})
    if not wanted & set(there):
        raise ValueError(f"Expected `split` to be one of {there}, the splits of {found.source}, got {split!r}.")
    for number, entry in entries:
        if not isinstance(entry["split"], str) or entry["split"] not in wanted:
            continue
        name, folder = entry["filename"], entry.get("filepath", "")  # only COCO's has `filepath`, such as "val2014"
        is_path = isinstance(name, str) and name.strip() and isinstance(folder, str)
        sentences = entry["sentences"]
        captions = [_raw(sentence) for sentence in sentences] if isinstance(sentences, list) else sentences
        image = Path(folder, name) if is_path else name
        found.add(image, captions, f"entry {number} of 'images'")
        if "cocoid" in entry and isinstance(sentences, list):
            kept = [sentence for sentence in sentences if split_captions([_raw(sentence)])[0]]
            found.add_ids(image, entry["cocoid"], [_sentence_id(sentence) for sentence in kept])


def _sentence_id(sentence: Any) -> Any:
    return sentence.get("sentid") if isinstance(sentence, dict) else None


def _raw(sentence: Any) -> Any:
    return sentence.get("raw", sentence) if isinstance(sentence, dict) else sentence


def _entries(
    content: Any, name: str, keys: tuple[str, ...], found: CaptionsOfImages
) -> list[tuple[int, dict[str, Any]]]:
    """Return the numbered objects of a list in a JSON file. Raise if it is none, or if a key is missing."""
    entries = content.get(name) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not isinstance(entries, list):
        got = f"the keys {shorten(list(content))}" if isinstance(content, dict) else shorten(content)
        raise ValueError(
            f"Expected {found.source} to be Karpathy's, COCO's with 'images' and 'annotations', or a list of objects, got "
            f"{got}. `read_pairs` reads all three."
        )
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not set(keys) <= set(entry):
            raise ValueError(
                f"Expected entry {number} of {name!r} in {found.source} to have {', '.join(map(repr, keys))}, got "
                f"{shorten(entry)}."
            )
    return list(enumerate(entries, 1))


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)
