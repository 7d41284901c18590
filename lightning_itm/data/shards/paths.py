"""Where the shards of a set are, what their manifest says, and how often a remote one is tried."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from glob import glob
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeVar

from braceexpand import braceexpand

Item = TypeVar("Item")
Source = str | PathLike[str] | Sequence[str | PathLike[str]]

MANIFEST = "manifest.json"
WAITS: tuple[float, ...] = (1.0, 2.0, 4.0)
"""Seconds before a transfer that broke off is tried again, for each try."""
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def find_shards(shards: str | PathLike[str] | Sequence[str | PathLike[str]]) -> list[str]:
    """List the shards of a set, and check that every local one exists.

    Args:
        shards: Where the shards are. A folder means all of its ``.tar`` files, or those of its ``manifest.json``. Also a
            pattern such as ``"train/{00000..00031}.tar"`` or ``"train/*.tar"``, the path or the address of one shard, or a
            list of these.

    Returns:
        The path or the address of each shard, in the order in which images are numbered.

    Raises:
        FileNotFoundError: if a local shard does not exist, or if there is none at all.
        ValueError: if a local shard is compressed, also where it lies in a folder beside others, or if a shard comes twice.

    Example:
        >>> from lightning_itm.data.shards import find_shards
        >>> find_shards("https://host/{0..1}.tar")
        ['https://host/0.tar', 'https://host/1.tar']
    """
    if not isinstance(shards, str | PathLike):
        found = [shard for entry in shards for shard in find_shards(entry)]
    elif Path(shards).is_dir():
        # A manifest knows also of a shard that was lost since it was written.
        manifest = read_manifest(Path(shards))
        names = [entry["name"] for entry in manifest["shards"]] if manifest else tar_files(Path(shards))
        found = [str(Path(shards, name)) for name in names]
    else:
        found = [path for name in braceexpand(fspath(shards)) for path in _matches(name)]
    # Remote shards are not asked for here: one request per shard would take minutes.
    missing = [shard for shard in found if not is_remote(shard) and not Path(shard).is_file()]
    if missing or not found:
        raise FileNotFoundError(
            f"Expected every shard to be there, found none at {missing[0]} ({len(missing)} of {len(found)} are missing)."
            if missing
            else f"Expected at least one .tar file in {shards}, found none."
        )
    compressed = [shard for shard in found if not is_remote(shard) and shard.lower().endswith(COMPRESSED)]
    if compressed:
        raise ValueError(
            f"Expected every shard to be an uncompressed .tar, in which any image can be found, got {compressed[0]} "
            f"({len(compressed)} of {len(found)} are compressed). Decompress it, or name only the others: 'folder/*.tar'."
        )
    _check_once(found)
    return found


def is_remote(shard: str) -> bool:
    """Return whether a shard has to be fetched, as one of ``https:``, ``s3:`` or ``pipe:`` has."""
    # A local file may have a colon in its name.
    return ":" in shard.split("/", 1)[0] and not Path(shard).is_file()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest that :func:`~lightning_itm.write_shards` left in a folder. ``None`` if there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return manifest


def _check_once(shards: list[str]) -> None:
    seen: dict[str, str] = {}
    for shard in shards:
        place = shard if is_remote(shard) else os.path.realpath(shard)
        if place in seen:
            raise ValueError(
                f"Expected every shard once, got {shard} twice (first as {seen[place]}): each of its images would be a "
                "negative of its own texts. List it once."
            )
        seen[place] = shard


def _matches(name: str) -> list[str]:
    is_pattern = any(sign in name for sign in "*?[") and not is_remote(name) and not Path(name).is_file()
    return sorted(glob(name)) or [name] if is_pattern else [name]


def tar_files(folder: Path) -> list[str]:
    """List the names of the tar files in a folder, compressed ones, too. Hidden files are passed over."""
    names = (path.name for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(name for name in names if name.lower().endswith((".tar", *COMPRESSED)))


def fetched_again(shard: str, read: Callable[[], Iterable[Item]]) -> Iterator[Item]:
    """Yield what is read of a shard, and read it again if it is remote and its transfer breaks off.

    Args:
        shard: The path or the address of the shard.
        read: Reads the shard from its start. When it is called again, it must leave out what it has yielded.

    Raises:
        OSError: if a local shard can't be read, or if each transfer of a remote one breaks off.
    """
    for wait in (*WAITS, None):
        try:
            yield from read()
            return
        except OSError as error:
            if not is_remote(shard):
                raise
            if wait is None:
                raise OSError(
                    f"Expected to fetch the shard {shard}, got: {error}, in each of {len(WAITS) + 1} tries. Is it there, and "
                    "the connection well? A run that has a checkpoint can be resumed."
                ) from error
            time.sleep(wait)


def check_present(shards: Sequence[str], number: int) -> None:
    """Raise if a local shard is gone.

    Args:
        shards: The shards of a set.
        number: Which of them, as an index.

    Raises:
        FileNotFoundError: if there is no file.
    """
    path = shards[number]
    if not is_remote(path) and not Path(path).is_file():
        raise FileNotFoundError(
            f"Expected shard {number} of the {len(shards)} shards at {path}, found none. It was there when the set was "
            "opened. Put it back, and resume the run."
        )


def other_sizes(shards: Iterable[str]) -> set[str]:
    """Return which local shards have another size than their manifest says. A cut between two samples shows nowhere else."""
    sizes = {
        (folder, entry["name"]): entry["bytes"]
        for folder in {Path(shard).parent for shard in shards if not is_remote(shard)}
        for entry in (read_manifest(folder) or {"shards": []})["shards"]
    }
    known = [(shard, sizes.get((Path(shard).parent, Path(shard).name))) for shard in shards]
    return {shard for shard, size in known if size is not None and size != Path(shard).stat().st_size}


def is_shards(source: Source) -> bool:
    """Return whether a source is tar shards: a folder of them, a pattern, an address or a list."""
    if not isinstance(source, str | PathLike):
        return True
    if is_remote(fspath(source)) or fspath(source).lower().endswith((".tar", *COMPRESSED)):
        return True
    names = tar_files(Path(source)) if Path(source).is_dir() else []
    # An archive beside images with their texts is what these came in. By itself, it is a shard that must be decompressed.
    return any(name.lower().endswith(".tar") for name in names) or (
        names != [] and not any(Path(source).rglob("*.txt"))
    )
