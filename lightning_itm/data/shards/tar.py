"""Read a tar file: which image-text samples it has, and the bytes of one image."""

import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, cast

from webdataset import gopen
from webdataset.tariterators import base_plus_ext

from lightning_itm.data.image import IMAGE_ENDINGS
from lightning_itm.data.shards.captions import Fault, read_captions, read_hard_captions
from lightning_itm.data.shards.paths import is_remote
from lightning_itm.data.shards.stamps import changed_shard


@dataclass(frozen=True)
class TarMember:
    """One file within an uncompressed tar file on a local disk.

    Attributes:
        path: The tar file.
        key: The name of the sample, which is that of the file without its ending.
        offset: Where the content of the file starts, in bytes from the start of the tar file.
        size: How many bytes the file has.
        index_file: The file of the index that says so.
    """

    path: str
    key: str
    offset: int
    size: int
    index_file: str = ""

    def check(self) -> None:
        """Raise if the shard was replaced since it was indexed: the header before the content must be that of this file.

        Raises:
            RuntimeError: if another file, or none, starts here.
        """
        with suppress(OSError), open(self.path, "rb") as file:  # a shard that is gone is told where it is read
            file.seek(self.offset - tarfile.BLOCKSIZE)
            header = file.read(tarfile.BLOCKSIZE)
            try:
                info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                raise changed_shard(self.path, f"no file at byte {self.offset}", self.index_file) from None
            if info.size != self.size or not _is_name_of(info.name, self.key):
                found = f"{info.name} of {info.size} bytes where {self.key} of {self.size} bytes was"
                raise changed_shard(self.path, found, self.index_file)

    def read_bytes(self) -> bytes:
        """Read the content of this file, and nothing else of the tar file."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def __str__(self) -> str:
        return f"{self.path}, key {self.key}"


def _is_name_of(name: str, key: str) -> bool:
    # A header holds 100 bytes of ASCII. What does not fit stands in another header before, and is not compared.
    prefix, _ = base_plus_ext(name)
    return prefix == key or not key.isascii() or len(key) > tarfile.LENGTH_NAME - len(".jpeg")


@dataclass
class ShardContents:
    """The image-text samples of one shard, in the order of the tar file. Each list has one entry per sample."""

    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    text_ids: list[list[int] | None] = field(default_factory=list)
    hard_captions: list[list[list[str]] | None] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    """One entry for each thing that is left out: a sample, or a caption of one."""


def read_shard(shard: str) -> ShardContents:
    """List the samples of a shard. Of a local shard, only headers and texts are read, not the images."""
    contents = ShardContents()
    for key, members in group_samples(_members(shard, contents), contents.faults):
        # Looked for in the order of the endings: a sample may have a .jpg and a .png of the same picture.
        images = [members[ending] for ending in IMAGE_ENDINGS if ending in members]
        content = {ending: content for ending, (_, _, content) in members.items()}
        texts, text_ids, faults = read_captions(key, content)
        if not images:
            contents.faults.append(Fault("without an image", key))
        elif not texts:
            contents.faults += faults or [Fault("without a caption", key)]
        else:
            hard_captions, hard_faults = read_hard_captions(key, content, len(texts))
            contents.faults += faults + hard_faults
            contents.hard_captions.append(hard_captions)
            offset, size, _ = images[0]
            contents.keys.append(key)
            contents.offsets.append(offset)
            contents.sizes.append(size)
            contents.texts.append(texts)
            contents.text_ids.append(text_ids)
    return contents


Content = TypeVar("Content")


def group_samples(
    members: Iterable[tuple[str, Content]], faults: list[Fault] | None = None
) -> Iterator[tuple[str, dict[str, Content]]]:
    """Group the files of a tar file into samples. Files whose names are equal up to the first dot are one sample.

    The files of a sample must stand one after the other. Of two files with the same ending, the first counts. Hidden files,
    whose name begins with a dot, are passed over: macOS puts one beside each file that it packs.

    Args:
        members: Name and content of each file, in the order of the tar file.
        faults: A list to which files that belong to no sample are added. By default, they are ignored silently.

    Yields:
        The key of each sample, and its contents by their endings in lower case.

    Example:
        >>> from lightning_itm.data.shards.tar import group_samples
        >>> list(group_samples([("a.jpg", 1), ("a.TXT", 2), ("b.jpg", 3)]))
        [('a', {'jpg': 1, 'txt': 2}), ('b', {'jpg': 3})]
    """
    key, found, done = "", dict[str, Content](), set[str]()
    for name, content in members:
        prefix, ending = base_plus_ext(name)  # at the first dot after the last slash: folders may have dots
        if prefix is None or name.rsplit("/", 1)[-1].startswith("."):
            continue
        if prefix != key:  # the last sample is complete
            if found:
                yield key, found
            done.add(key)
            key, found = prefix, {}
        ending = ending.lower()
        if prefix in done or ending in found:  # its sample has ended already, or has such a file already
            if faults is not None:
                faults.append(Fault("with a key that came before", prefix))
        else:
            found[ending] = content
    if found:
        yield key, found


def _members(shard: str, contents: ShardContents) -> Iterator[tuple[str, tuple[int, int, bytes | None]]]:
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
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every header in memory
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
            contents.faults.append(Fault(kind, name))


def _open_tar(file: Any, mode: Literal["r:", "r|"]) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode=mode)


class _Counted:
    """Count how many bytes of a stream were read, because a stream has no ``tell``."""

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
    """Open a shard for reading. A remote one is fetched by webdataset. It is closed even if it is not read to its end."""
    if not is_remote(shard):
        with open(shard, "rb") as file:
            yield file
        return
    remote = gopen(shard)
    try:
        yield remote
    finally:
        with suppress(OSError):  # we stopped early, and the process that fetches it complains about that
            remote.close()


def check_fetched(file: Any) -> None:
    """Wait until the process that fetches a remote shard has ended. Does nothing for a local shard.

    Raises:
        OSError: if the process failed.
    """
    if hasattr(file, "wait_for_child"):
        while file.read(1 << 20):  # it ends only when all that it sends was read
            pass
        file.wait_for_child()
