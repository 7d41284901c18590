"""Which image-text samples a tar file has, and one file of it by itself."""

import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, cast

from webdataset import gopen
from webdataset.tariterators import base_plus_ext

from lightning_itm.data.image import IMAGE_ENDINGS
from lightning_itm.data.shards.paths import is_remote


@dataclass(frozen=True)
class TarMember:
    """A file within an uncompressed tar file on a local disk."""

    path: str
    key: str
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        """Read it, and nothing else of the archive."""
        with open(self.path, "rb") as file:
            return os.pread(file.fileno(), self.size, self.offset)

    def __str__(self) -> str:
        return f"{self.path}, key {self.key}"


@dataclass
class ShardContents:
    """The image-text samples of one shard, in the order of the archive."""

    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    text_ids: list[list[int] | None] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)
    """What is left out: the kind, and the key of the sample."""


def read_shard(shard: str) -> ShardContents:
    """Read which samples a shard has; of a local one, only headers and texts."""
    contents = ShardContents()
    for key, members in group_samples(_members(shard, contents), contents.faults):
        images = [members[ending] for ending in IMAGE_ENDINGS if ending in members]
        texts, text_ids = _texts(members)
        if not images:
            contents.faults.append(("without an image", key))
        elif not texts:
            contents.faults.append(("without a caption", key))
        else:
            offset, size, _ = images[0]
            contents.keys.append(key)
            contents.offsets.append(offset)
            contents.sizes.append(size)
            contents.texts.append(texts)
            contents.text_ids.append(text_ids)
    return contents


Member = tuple[int, int, bytes | None]
"""Offset, size, and the content of what is no image."""

Content = TypeVar("Content")


def group_samples(
    members: Iterable[tuple[str, Content]], faults: list[tuple[str, str]] | None = None
) -> Iterator[tuple[str, dict[str, Content]]]:
    """Yield each key with its files by their ending, in lower case; the first of two alike counts.

    A key is a name up to the first dot after the last slash, and the files of a sample stand one after the other.

    Args:
        members: Name and content of each file.
        faults: Where to note files that belong to no sample.
    """
    key, found, done = "", dict[str, Content](), set[str]()
    for name, content in members:
        prefix, ending = base_plus_ext(name)
        if prefix is None:
            continue
        if prefix != key:
            if found:
                yield key, found
            done.add(key)
            key, found = prefix, {}
        ending = ending.lower()
        if prefix in done or ending in found:
            if faults is not None:
                faults.append(("with a key that came before", prefix))
        else:
            found[ending] = content
    if found:
        yield key, found


def _members(shard: str, contents: ShardContents) -> Iterator[tuple[str, Member]]:
    end = None if is_remote(shard) else Path(shard).stat().st_size
    name = ""
    with open_shard(shard) as file:
        counted = _Counted(file)
        try:
            archive = _open_tar(file if end is not None else counted, "r:" if end is not None else "r|")
            for info in archive:
                name = info.name
                if not info.isreg():
                    continue
                if end is not None and info.offset_data + info.size > end:
                    raise tarfile.ReadError("unexpected end of data")
                is_text = name.lower().endswith((".json", ".txt"))
                content = cast("Any", archive.extractfile(info)).read() if is_text else None
                yield name, (info.offset_data, info.size, content)
                archive.members = []  # type: ignore[attr-defined]
            # What tarfile takes for the end may be a damaged header, or the end of the first of two archives.
            if end is None:
                while counted.read(1 << 20):
                    pass
                check_fetched(counted)
                rest = counted.num_bytes - archive.offset
                is_end = tarfile.BLOCKSIZE <= rest <= tarfile.RECORDSIZE + 2 * tarfile.BLOCKSIZE
            else:
                file.seek(archive.offset)
                is_end = archive.offset < end and all(not any(part) for part in iter(lambda: file.read(1 << 20), b""))
            if not is_end:
                raise tarfile.ReadError("no end-of-archive marker")
        except tarfile.ReadError as error:
            check_fetched(counted)
            kind = "after which the file breaks off" if name else f"in a file that is no uncompressed tar ({error})"
            contents.faults.append((kind, name))


def _open_tar(file: Any, mode: Literal["r:", "r|"]) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode=mode)


class _Counted:
    """A file that is read from front to back, and how many bytes of it were."""

    def __init__(self, file: Any) -> None:
        self.file, self.num_bytes = file, 0
        if hasattr(file, "wait_for_child"):
            self.wait_for_child = file.wait_for_child

    def read(self, size: int = -1) -> bytes:
        data: bytes = self.file.read(size)
        self.num_bytes += len(data)
        return data


@contextmanager
def open_shard(shard: str) -> Iterator[BinaryIO]:
    """Open a shard, a remote one by webdataset's means; it is closed also if nobody reads it to its end."""
    if not is_remote(shard):
        with open(shard, "rb") as file:
            yield file
        return
    remote = gopen(shard)
    try:
        yield remote
    finally:
        with suppress(OSError):  # the process that fetches it was not done; we were
            remote.close()


def check_fetched(file: Any) -> None:
    """Wait until the process that fetches a remote shard is done.

    Raises:
        OSError: It failed.
    """
    if hasattr(file, "wait_for_child"):
        while file.read(1 << 20):
            pass
        file.wait_for_child()


def _texts(members: dict[str, Member]) -> tuple[list[str], list[int] | None]:
    """Return the texts of a sample: those of its .json, or else its .txt, or else the caption of its .json."""
    try:
        facts = json.loads(members["json"][2] or b"{}") if "json" in members else {}
    except (UnicodeDecodeError, json.JSONDecodeError):
        facts = {}
    facts = facts if isinstance(facts, dict) else {}
    texts, ids = facts.get("texts"), facts.get("text_ids")
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        is_ours = isinstance(ids, list) and len(ids) == len(texts) and all(type(number) is int for number in ids)
        return [_clean(text) for text in texts], ids if is_ours else None
    text = (members["txt"][2] or b"").decode("utf-8-sig", errors="replace").strip() if "txt" in members else ""
    text = text or _clean(str(facts.get("caption") or "")).strip()
    return [text] if text else [], None


def _clean(text: str) -> str:
    """Replace what is no character; half of a pair of UTF-16 comes with texts from the web."""
    return text.encode("utf-8", errors="replace").decode()
