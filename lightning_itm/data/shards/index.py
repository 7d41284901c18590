"""The index of a set of tar shards: where each image is. Built once, kept in a file, and mapped by every process."""

import os
import time
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_itm.data.image import IMAGE_ENDINGS
from lightning_itm.data.inputs.packed_strings import PackedStrings
from lightning_itm.data.shards.captions import Fault, count_faults, pack_hard_captions
from lightning_itm.data.shards.paths import MANIFEST, Source, fetched_again, find_shards, is_remote, other_sizes
from lightning_itm.data.shards.stamps import (
    changed_shard,
    check_index_is_ours,
    default_index_path,
    is_same,
    stamp,
    whole_address,
)
from lightning_itm.data.shards.tar import ShardContents, TarMember, read_shard

STORED = ("first", "offset", "size", "text_image_id", "faults", "first_fault", "seen")
INDEX_VERSION = 2  # of 1, a .txt was one text, whatever it had for lines


@dataclass
class ShardIndex:
    """Know where every image of a set of shards is, and have all of its texts. Ids count from 0 in the order of the shards.

    Attributes:
        shards: The paths or addresses of the shards.
        key: The key of each image, which is its name in the shard without the ending.
        first: The id of the first image of each shard, and at the end the number of images. int64 `(shards + 1,)`.
        offset: Where in its shard each image starts, in bytes. int64 `(images,)`.
        size: How many bytes each image has. int64 `(images,)`.
        text: All texts of the set, by their ids.
        text_image_id: The image that each text belongs to. int64 `(texts,)`.
        faults: How many samples or captions are left out, by what is wrong with them. Such as ``{"without an image": 2}``.
        first_fault: For each kind of fault, the shard and the key of the first sample that has it, and what it has instead.
        seen: What :func:`~lightning_itm.data.shards.stamps.stamp` said of each shard when it was indexed.
        file: The file of the index.
        hard_captions: Those of each text, of :func:`~lightning_itm.data.shards.captions.pack_hard_captions`.
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
    seen: list[list[Any]] = field(default_factory=list)
    file: str = ""
    hard_captions: list[Tensor] | None = None

    @classmethod
    def open(
        cls, shards: Source, path: str | PathLike[str] | None = None, *, hard_captions: bool = False
    ) -> "ShardIndex":
        """Open the index of a set of shards. It is built first if there is none, or if the shards have changed.

        Args:
            shards: A folder, a pattern, a path, an address, or a list of these. :func:`find_shards` has the details.
            path: The file of the index. By default, it lies beside the first shard. Remote shards need one.
            hard_captions: Build it anew if it was built before hard captions were stored.

        Raises:
            FileNotFoundError: if a local shard does not exist.
            ValueError: if no sample can be used, if the shards are remote and ``path`` is not given, or if ``path`` is the
                index of another set.
            PermissionError: if the file can't be written, because the folder is not ours or the disk is full.
        """
        found = find_shards(shards)
        file = Path(path) if path is not None else default_index_path(found)
        index = cls._load(file, found, is_named=path is not None) if file.is_file() else None
        index = None if hard_captions and index and index.hard_captions is None else index
        if index is None:
            seen = [stamp(shard) for shard in found]  # first: what changes while it is read is found later
            built = cls._put_together(found, read_all(found))
            built.seen, built.file = seen, str(file)
            built._save(file)
            index = cls._load(
                file, found, is_named=False
            )  # mapped: what was built is in the memory of this process alone
        return index or built  # another process may have written its own in between

    def member(self, image_id: int) -> TarMember:
        """Return the place of an image: its shard, and where in the shard its bytes are."""
        shard = self.shards[self.shard_of(image_id)]
        place = int(self.offset[image_id]), int(self.size[image_id])
        return TarMember(shard, self.key[image_id], *place, index_file=self.file)

    def check_unchanged(self, shard: int) -> None:
        """Raise if a remote shard has changed since it was indexed, as far as its server tells.

        A local one was compared when the set was opened. If it breaks off later, other pairs stand in for what is lost.

        Args:
            shard: Which shard, as an index of ``shards``.

        Raises:
            RuntimeError: if size, time or entity tag are others.
        """
        path = self.shards[shard]
        if shard < len(self.seen) and is_remote(path):
            then, now = self.seen[shard], stamp(path)
            if not is_same(then, now):
                raise changed_shard(path, f"{now} instead of {then}", self.file)

    def check_sample(self, image_id: int, data: bytes, text_ids: Iterable[int], captions: list[str]) -> None:
        """Raise if an image has another number of bytes than when its shard was indexed, or other captions.

        Args:
            image_id: The image.
            data: Its bytes as they are now.
            text_ids: Texts of it that are wanted.
            captions: All of its captions as they are now, none if they are not known.

        Raises:
            RuntimeError: if it is so.
        """
        size = int(self.size[image_id])
        others = [self.text[text_id] for text_id in text_ids if self.text[text_id] not in captions]
        if len(data) != size:
            what = f"{self.key[image_id]} of {len(data)} bytes instead of {size}"
        elif captions and others:  # none where a transfer broke off after the image
            what = f"the captions {captions} of {self.key[image_id]}, and not {others[0]!r}"
        else:
            return
        raise changed_shard(self.shards[self.shard_of(image_id)], what, self.file)

    def shard_of(self, image_id: int) -> int:
        """Return which shard an image is in, as an index of ``shards``."""
        return int(torch.searchsorted(self.first, image_id, right=True)) - 1  # the last one that begins before it

    @classmethod
    def _put_together(cls, shards: list[str], contents: list[ShardContents]) -> "ShardIndex":
        faults, first_fault = count_faults(shards, [part.faults for part in contents])
        lists = [texts for part in contents for texts in part.texts]
        if not lists:
            raise ValueError(
                f"Expected an image with a text in the {len(shards)} shards, {shards[0]} the first, found none"
                + (f" ({faults})" if faults else "")
                + f". A sample is an image ({', '.join(IMAGE_ENDINGS)}) and a .txt, or a .json with 'texts' or 'caption'."
            )
        texts = [text for entry in lists for text in entry]
        text_image_id = torch.repeat_interleave(torch.tensor([len(entry) for entry in lists]))
        hard = [hard for part in contents for hard in part.hard_captions]
        wrong = [some for of, texts in zip(hard, lists, strict=True) for some in of or [[]] * len(texts)]  # per text
        ids = [ids for part in contents for ids in part.text_ids]
        if all(entry is not None for entry in ids):
            text_id = torch.tensor([number for entry in ids for number in cast("list[int]", entry)])
            # Only where none is missing: ids stay dense, and texts are numbered as before they were written.
            if torch.equal(text_id.sort().values, torch.arange(len(texts))):
                order = text_id.argsort()  # (texts,)
                texts, text_image_id = [texts[index] for index in order.tolist()], text_image_id[order]
                wrong = [wrong[index] for index in order.tolist()]
        counts = torch.tensor([0, *(len(part.keys) for part in contents)])
        return cls(
            shards,
            PackedStrings.pack(key for part in contents for key in part.keys),
            counts.cumsum(0),
            torch.tensor([offset for part in contents for offset in part.offsets]),
            torch.tensor([size for part in contents for size in part.sizes]),
            PackedStrings.pack(texts),
            text_image_id,
            faults,
            first_fault,
            hard_captions=pack_hard_captions(wrong),
        )

    def _save(self, path: Path) -> None:
        values = {
            "version": INDEX_VERSION,
            "shards": [Path(shard).name for shard in self.shards],
            "paths": [whole_address(shard) for shard in self.shards],
            "key": [self.key.data, self.key.end],
            "text": [self.text.data, self.text.end],
            "hard_captions": self.hard_captions,
            **{name: getattr(self, name) for name in STORED},
        }
        part = path.with_name(f".{path.name}-{os.getpid()}-{time.time_ns()}")
        try:
            with open(part, "xb") as file:
                torch.save(values, file)
            os.replace(part, path)  # in one step: several processes may build it, and none may read half of it
        except (OSError, RuntimeError) as error:  # PyTorch raises a RuntimeError where there is no room
            with suppress(OSError):  # the error that is told is that of writing
                part.unlink(missing_ok=True)
            raise PermissionError(
                f"Expected to write the index of the shards to {path}, got: {error}. Name another file with `index`, or make "
                "room."
            ) from error

    @classmethod
    def _load(cls, path: Path, shards: list[str], *, is_named: bool) -> "ShardIndex | None":
        if not os.access(path, os.R_OK):
            raise PermissionError(f"Expected to read {path}, the index of the shards. Name another file with `index`.")
        try:
            with zipfile.ZipFile(path) as archive:
                is_whole = archive.testzip() is None  # compares checksums, which PyTorch writes and does not read
            values: Any = torch.load(path, mmap=True, weights_only=True) if is_whole else None
        except Exception:  # a damaged file can raise anything, and is built anew
            return None
        if not isinstance(values, dict) or values.get("version") != INDEX_VERSION:
            return None
        # By names and not by paths: a folder that is moved with its index needs no new one.
        is_named_so = values["shards"] == [Path(shard).name for shard in shards]
        if is_named:  # one beside the shards may have been copied with them
            check_index_is_ours(path, values["paths"], values["seen"], shards)
        # Remote shards are compared when they are read: one request for each would take minutes here.
        local = [pair for pair in zip(shards, values["seen"], strict=False) if not is_remote(pair[0])]
        as_seen = all(stamp(shard) == seen for shard, seen in local)
        if not (is_named_so and as_seen):
            return None
        rest: Any = {name: values[name] for name in STORED} | {
            "text": PackedStrings(*values["text"]),
            "file": str(path),
            "hard_captions": values.get("hard_captions"),
        }
        return cls(shards, PackedStrings(*values["key"]), **rest)


def read_all(shards: list[str]) -> list[ShardContents]:
    """List the samples of all shards. Several processes read at the same time."""
    # No process for fewer than four shards: it would take longer to start than to read them.
    num_workers = min(len(shards) // 4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, 16)
    options: dict[str, Any] = {"collate_fn": _read, "num_workers": num_workers, "generator": torch.Generator()}
    loader: Any = DataLoader(cast("Any", shards), batch_size=None, **options)
    contents: list[ShardContents] = list(loader)  # the generator is its own: none of the run's random numbers is used
    others = other_sizes(shards)
    for shard, part in zip(shards, contents, strict=True):
        if shard in others:
            part.faults.append(Fault(f"(any number) of a shard that has another size than {MANIFEST} says", ""))
    return contents


def _read(shard: str) -> ShardContents:
    return next(fetched_again(shard, lambda: [read_shard(shard)]))
