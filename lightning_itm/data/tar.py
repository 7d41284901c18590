"""Which image-text samples a tar file has, and one file of it by itself."""

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any, BinaryIO, cast

from braceexpand import braceexpand
from webdataset import gopen
from webdataset.tariterators import base_plus_ext

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
MANIFEST = "manifest.json"


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


def find_shards(shards: str | PathLike[str] | Sequence[str | PathLike[str]]) -> list[str]:
    """List the shards of a set.

    Args:
        shards: A folder (all of its ``.tar`` files, or those of its ``manifest.json``), a pattern such as
            ``"train/{00000..00031}.tar"``, the path or the address of one shard, or a list of these.

    Raises:
        FileNotFoundError: A shard is not there, or there is none.

    Example:
        >>> find_shards("https://host/{0..1}.tar")
        ['https://host/0.tar', 'https://host/1.tar']
    """
    if not isinstance(shards, str | PathLike):
        found = [shard for entry in shards for shard in find_shards(entry)]
    elif Path(shards).is_dir():
        manifest = read_manifest(Path(shards))
        names = [entry["name"] for entry in manifest["shards"]] if manifest else _tar_files(Path(shards))
        found = [str(Path(shards, name)) for name in names]
    else:
        found = list(braceexpand(fspath(shards)))
    missing = [shard for shard in found if not is_remote(shard) and not Path(shard).is_file()]
    if missing or not found:
        raise FileNotFoundError(
            f"Expected every shard to be there, found none at {missing[0]} ({len(missing)} of {len(found)} are missing)."
            if missing
            else f"Expected at least one .tar file in {shards}, found none."
        )
    return found


def is_remote(shard: str) -> bool:
    """Return whether webdataset has to fetch it: such as ``https:``, ``s3:`` or ``pipe:``."""
    return ":" in shard.split("/", 1)[0] and not Path(shard).is_file()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return what :func:`~lightning_itm.write_shards` said about a folder, if it is one of its."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return manifest


def read_shard(shard: str) -> ShardContents:
    """Read which samples a shard has; of a local one, only headers and texts."""
    contents = ShardContents()
    for key, members in _samples(shard, contents):
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


def _samples(shard: str, contents: ShardContents) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yield the members of each key; those of a sample stand one after the other."""
    key, members, done = "", dict[str, Member](), set[str]()
    for name, member in _members(shard, contents):
        prefix, ending = base_plus_ext(name)
        if prefix is None:
            continue
        if prefix != key:
            if members:
                yield key, members
            done.add(key)
            key, members = prefix, {}
        ending = ending.lower()
        if prefix in done or ending in members:
            contents.faults.append(("with a key that came before", prefix))
        else:
            members[ending] = member
    if members:
        yield key, members


def _members(shard: str, contents: ShardContents) -> Iterator[tuple[str, Member]]:
    end = None if is_remote(shard) else Path(shard).stat().st_size
    name = ""
    with open_shard(shard) as file:
        try:
            archive = tarfile.open(fileobj=file, mode="r|" if end is None else "r:")  # noqa: SIM115
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
            if end is not None and archive.offset >= end:
                raise tarfile.ReadError("no end-of-archive marker")
        except tarfile.ReadError as error:
            check_fetched(file)
            kind = "after which the file breaks off" if name else f"in a file that is no uncompressed tar ({error})"
            contents.faults.append((kind, name))


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
    try:
        facts = json.loads(members["json"][2] or b"{}") if "json" in members else {}
    except (UnicodeDecodeError, json.JSONDecodeError):
        facts = {}
    facts = facts if isinstance(facts, dict) else {}
    if isinstance(facts.get("texts"), list):
        texts, ids = facts["texts"], facts.get("text_ids")
        is_ours = isinstance(ids, list) and len(ids) == len(texts)
        if all(isinstance(text, str) for text in texts):
            return texts, ids if is_ours else None
    if "txt" in members:
        texts = [(members["txt"][2] or b"").decode(errors="replace").strip()]
    else:
        texts = [str(facts.get("caption") or "").strip()]
    return [text for text in texts if text], None


def _tar_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.tar"))
