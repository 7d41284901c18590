"""What is where in a set of tar shards: found once, kept in a file, mapped by every process."""

import os
import pickle
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_itm.data.shards.paths import MANIFEST, find_shards, is_remote, read_manifest
from lightning_itm.data.shards.tar import ShardContents, TarMember, read_shard

INDEX_VERSION = 1
INDEX_ENDING = ".index"


class PackedStrings(Sequence[str]):
    """Strings one after the other in a tensor of bytes: a million take a few megabytes, and workers share them.

    Args:
        data: uint8, all strings in UTF-8.
        end: int64 `(strings,)`; where each ends.

    Example:
        >>> strings = PackedStrings.pack(["a dog", "", "über"])
        >>> len(strings), strings[-1], list(strings[:2])
        (3, 'über', ['a dog', ''])
    """

    def __init__(self, data: Tensor, end: Tensor) -> None:
        self.data, self.end = data, end

    @classmethod
    def pack(cls, strings: Iterable[str]) -> "PackedStrings":
        """Put strings one after the other."""
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]  # names of files may be no UTF-8
        data = torch.frombuffer(bytearray(b"".join(encoded)) or bytearray(1), dtype=torch.uint8)
        return cls(data, torch.tensor([len(part) for part in encoded], dtype=torch.int64).cumsum(0))

    def __len__(self) -> int:
        return len(self.end)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"Expected an index below {len(self)}, got {index}.")
        index %= len(self)
        start = int(self.end[index - 1]) if index else 0
        return self.data[start : int(self.end[index])].numpy().tobytes().decode("utf-8", "surrogatepass")


@dataclass
class ShardIndex:
    """Which images and texts a set of shards has, and where. Ids count from 0 in the order of the shards.

    Attributes:
        shards: Paths or addresses.
        key: The key of each image.
        first: int64 `(shards + 1,)`; the first image of each shard, and the number of images.
        offset: int64 `(images,)`; where the bytes of each image start in its shard.
        size: int64 `(images,)`; how many there are.
        text: The texts.
        text_image_id: int64 `(texts,)`.
        faults: How many samples are left out, by kind.
        first_fault: Shard and key of the first of each kind.
    """

    shards: list[str]
    key: PackedStrings
    first: Tensor
    offset: Tensor
    size: Tensor
    text: PackedStrings
    text_image_id: Tensor
    faults: dict[str, int]
    first_fault: dict[str, str]

    @classmethod
    def open(
        cls, shards: str | PathLike[str] | Sequence[str | PathLike[str]], path: str | PathLike[str] | None = None
    ) -> "ShardIndex":
        """Map the index of a set of shards; build it first if there is none, or the shards have changed since.

        Args:
            shards: As for :func:`find_shards`.
            path: The file of the index; default: beside the first shard.

        Raises:
            FileNotFoundError: A shard is not there.
            ValueError: No sample can be used; or the shards are remote and ``path`` is not given.
            PermissionError: The file can't be written.
        """
        found = find_shards(shards)
        seen = [_stamp(shard) for shard in found]
        file = Path(path) if path is not None else _default_path(found)
        if file.is_file():
            index = cls._load(file, found, seen)
            if index is not None:
                return index
        contents = read_all(found)
        index = cls._put_together(found, contents)
        index._save(file, seen)
        return cast("ShardIndex", cls._load(file, found, seen))

    def member(self, image_id: int) -> TarMember:
        """Return where an image is."""
        shard = self.shards[self.shard_of(image_id)]
        return TarMember(shard, self.key[image_id], int(self.offset[image_id]), int(self.size[image_id]))

    def shard_of(self, image_id: int) -> int:
        """Return the number of the shard of an image."""
        return int(torch.searchsorted(self.first, image_id, right=True)) - 1

    @classmethod
    def _put_together(cls, shards: list[str], contents: list[ShardContents]) -> "ShardIndex":
        faults: Counter[str] = Counter()
        first_fault: dict[str, str] = {}
        for shard, part in zip(shards, contents, strict=True):
            for kind, key in part.faults:
                faults[kind] += 1
                first_fault.setdefault(kind, f"{shard}, key {key!r}" if key else shard)
        lists = [texts for part in contents for texts in part.texts]
        if not lists:
            raise ValueError(
                f"Expected an image with a text in the {len(shards)} shards, {shards[0]} the first, found none"
                + (f" ({dict(faults)})" if faults else "")
                + ". A sample is an image (.jpg, .png or .webp) and a .txt, or a .json with 'texts' or 'caption'."
            )
        texts = [text for entry in lists for text in entry]
        text_image_id = torch.repeat_interleave(torch.tensor([len(entry) for entry in lists]))
        ids = [ids for part in contents for ids in part.text_ids]
        if all(entry is not None for entry in ids):
            text_id = torch.tensor([number for entry in ids for number in cast("list[int]", entry)])
            if torch.equal(text_id.sort().values, torch.arange(len(texts))):  # as they were before they were written
                order = text_id.argsort()
                texts, text_image_id = [texts[place] for place in order.tolist()], text_image_id[order]
        counts = torch.tensor([0, *(len(part.keys) for part in contents)])
        return cls(
            shards,
            PackedStrings.pack(key for part in contents for key in part.keys),
            counts.cumsum(0),
            torch.tensor([offset for part in contents for offset in part.offsets]),
            torch.tensor([size for part in contents for size in part.sizes]),
            PackedStrings.pack(texts),
            text_image_id,
            dict(faults),
            first_fault,
        )

    def _save(self, path: Path, seen: list[list[int]]) -> None:
        values = {
            "version": INDEX_VERSION,
            "shards": [Path(shard).name for shard in self.shards],
            "seen": seen,
            "key": [self.key.data, self.key.end],
            "text": [self.text.data, self.text.end],
            **{name: getattr(self, name) for name in ("first", "offset", "size", "text_image_id")},
            "faults": self.faults,
            "first_fault": self.first_fault,
        }
        part = path.with_name(f".{path.name}-{os.getpid()}-{time.time_ns()}")
        try:
            with open(part, "xb") as file:
                torch.save(values, file)
            os.replace(part, path)  # at once: several processes may build it, and nobody may read half of it
        except OSError as error:
            part.unlink(missing_ok=True)
            raise PermissionError(
                f"Expected to write the index of the shards to {path}, got: {error}. Name another file with `index`."
            ) from error

    @classmethod
    def _load(cls, path: Path, shards: list[str], seen: list[list[int]]) -> "ShardIndex | None":
        if not os.access(path, os.R_OK):
            raise PermissionError(f"Expected to read {path}, the index of the shards. Name another file with `index`.")
        try:
            values = torch.load(path, mmap=True, weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError):  # damaged: it is built anew
            return None
        is_ours = isinstance(values, dict) and values.get("version") == INDEX_VERSION
        if not is_ours or values["shards"] != [Path(shard).name for shard in shards] or values["seen"] != seen:
            return None
        rest = {name: values[name] for name in ("first", "offset", "size", "text_image_id", "faults", "first_fault")}
        return cls(shards, PackedStrings(*values["key"]), text=PackedStrings(*values["text"]), **rest)


def read_all(shards: list[str]) -> list[ShardContents]:
    """Read the contents of all shards, several at a time."""
    num_workers = min(len(shards) // 4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, 16)
    loader = DataLoader(_Shards(shards), batch_size=None, num_workers=num_workers, generator=torch.Generator())
    contents: list[ShardContents] = list(loader)  # with a generator of its own: nothing is drawn from the run's streams
    sizes = {
        (folder, entry["name"]): entry["bytes"]
        for folder in {Path(shard).parent for shard in shards if not is_remote(shard)}
        for entry in (read_manifest(folder) or {"shards": []})["shards"]
    }
    for shard, part in zip(shards, contents, strict=True):
        path = Path(shard)
        if (path.parent, path.name) in sizes and sizes[path.parent, path.name] != path.stat().st_size:
            part.faults.append((f"(any number) of a shard that has another size than {MANIFEST} says", ""))
    return contents


class _Shards(Dataset[ShardContents]):
    def __init__(self, shards: list[str]) -> None:
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> ShardContents:
        return read_shard(self.shards[index])


def _stamp(shard: str) -> list[int]:
    if is_remote(shard):
        return []
    status = os.stat(shard)
    return [status.st_size, status.st_mtime_ns]


def _default_path(shards: list[str]) -> Path:
    if is_remote(shards[0]):
        raise ValueError(
            f"Expected `index`, the file in which to keep what is in the shards, because {shards[0]} is remote. It is "
            "written at the first use, which reads all of them once."
        )
    name = blake2b("\n".join(Path(shard).name for shard in shards).encode(), digest_size=4).hexdigest()
    return Path(shards[0]).parent / f"{name}{INDEX_ENDING}"
