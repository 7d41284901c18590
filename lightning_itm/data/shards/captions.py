"""The captions of a sample in a tar file, and what is wrong with a sample."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_itm.data.inputs.packed_strings import PackedStrings
from lightning_itm.data.readers.captions import captions_of_lines, shorten, split_captions
from lightning_itm.data.readers.hard_captions import hard_captions_of
from lightning_itm.data.readers.text_files import decode_text, load_json


class Fault(NamedTuple):
    """Say what is wrong with a sample.

    Attributes:
        kind: What is wrong, in words that follow a number. Such as ``"without an image"``.
        key: The key of the sample, or ``""`` if it is the whole shard.
        value: What was found instead, for a message.
    """

    kind: str
    key: str
    value: str = ""


def count_faults(shards: Sequence[str], faults: Sequence[Iterable[Fault]]) -> tuple[dict[str, int], dict[str, str]]:
    """Count the faults of shards by their kind, and say where the first of each kind is."""
    count: Counter[str] = Counter()
    first: dict[str, str] = {}
    for shard, part in zip(shards, faults, strict=True):
        for kind, key, value in part:
            count[kind] += 1
            where = f"{shard}, key {key!r}" if key else shard
            first.setdefault(kind, f"{where}: {value}" if value else where)
    return dict(count), first


def read_captions(key: str, members: dict[str, bytes | None]) -> tuple[list[str], list[int] | None, list[Fault]]:
    """Read the captions of a sample: the "texts" of its .json, else the lines of its .txt, else the "caption" of its .json.

    Args:
        key: The key of the sample, for the faults.
        members: The content of each of its files, by their endings. Only that of ``json`` and ``txt`` is read.

    Returns:
        The captions, the ids that :func:`~lightning_itm.write_shards` gave them or None, and what can't be used.
    """
    facts: Any = {}
    content, faults = "", list[Fault]()
    try:
        facts = load_json(members.get("json") or b"{}", "it")
    except ValueError as error:
        faults.append(Fault("with a .json that can't be read", key, shorten(str(error.__cause__))))
    try:
        content = decode_text(members.get("txt") or b"")
    except UnicodeError as error:
        faults.append(Fault("with a .txt that is no UTF-8", key, str(error)))
    facts = facts if isinstance(facts, dict) else {}
    for value in (facts.get("texts"), captions_of_lines(content), facts.get("caption")):
        texts, others = split_captions(value)
        if texts or not _is_nothing(value):  # what is not there is no fault while another place has a caption
            faults += [Fault("with a caption that is no text", key, shorten(other)) for other in others]
        if texts:
            return texts, _ids(facts, texts) if value is facts.get("texts") else None, faults
    return [], None, faults


def read_hard_captions(
    key: str, members: dict[str, bytes | None], num_texts: int
) -> tuple[list[list[str]] | None, list[Fault]]:
    """Read the "hard_captions" in the .json of a sample: one list for each text, or a text or a list for all of them.

    Args:
        key: The key of the sample, for the faults.
        members: The content of each of its files, by their endings. Only that of ``json`` is read.
        num_texts: Number of texts of the sample.

    Returns:
        One list per text, or None if there is none, and what can't be used.
    """
    content = members.get("json") or b"{}"
    if b'"hard_captions"' not in content:
        return None, []
    try:
        value = load_json(content, "it")["hard_captions"]
        is_nested = isinstance(value, list) and any(isinstance(entry, list) for entry in value)
        lists = [hard_captions_of(entry, key) for entry in (value if is_nested else [value] * num_texts)]
    except (ValueError, TypeError, KeyError):  # a .json that can't be read is a fault of its captions already
        lists = []
    if len(lists) != num_texts:
        return None, [Fault("with hard captions that are not one list of texts per caption", key)]
    return lists, []


def pack_hard_captions(lists: Sequence[Sequence[str]]) -> list[Tensor]:
    """Return the hard captions of all texts as tensors: their UTF-8, where each ends, and how many each text has."""
    packed = PackedStrings.pack(wrong for some in lists for wrong in some)
    return [packed.data, packed.end, torch.tensor([len(some) for some in lists])]


def unpack_hard_captions(data: Tensor, end: Tensor, counts: Tensor) -> list[list[str]]:
    """Return the hard captions of each text, from :func:`pack_hard_captions`."""
    strings = iter(PackedStrings(data, end))
    return [list(islice(strings, count)) for count in counts.tolist()]


def _is_nothing(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _ids(facts: dict[str, Any], texts: list[str]) -> list[int] | None:
    ids = facts.get("text_ids")
    if not isinstance(ids, list) or not len(ids) == len(texts) == len(facts["texts"]):
        return None
    return ids if all(type(number) is int and 0 <= number < 1 << 63 for number in ids) else None  # int64 holds no other
