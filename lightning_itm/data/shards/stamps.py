"""Tell whether shards are those that were indexed: by size and time, and remote ones by what their server says."""

import os
import urllib.request
from hashlib import blake2b
from pathlib import Path
from typing import Any

from lightning_itm.data.shards.paths import is_remote

INDEX_ENDING = ".index"


def stamp(shard: str) -> list[Any]:
    """Return what changes with a shard.

    Args:
        shard: Its path or its address.

    Returns:
        Size and time of a local shard. Content-Length, ETag and Last-Modified of one at ``http:`` or ``https:``, with None for
        what the server does not tell. Of other remote shards, and where no answer comes, an empty list.
    """
    if not is_remote(shard):
        status = os.stat(shard)
        return [status.st_size, status.st_mtime_ns]
    if not shard.startswith(("http:", "https:")):
        return []
    try:
        with urllib.request.urlopen(urllib.request.Request(shard, method="HEAD"), timeout=30) as answer:
            return [answer.headers.get(name) for name in ("Content-Length", "ETag", "Last-Modified")]
    except (OSError, ValueError):  # a server may refuse what is no GET
        return []


def is_same(then: list[Any], now: list[Any]) -> bool:
    """Return whether two stamps are of the same content, as far as they tell.

    Servers that share their work may give different tags to one file, so one of tag and time is enough.
    """
    if not then or not now:
        return True
    if then[0] is not None and now[0] is not None and then[0] != now[0]:
        return False
    known = [
        one == other for one, other in zip(then[1:], now[1:], strict=False) if one is not None and other is not None
    ]
    return any(known) or not known


def changed_shard(shard: str, what: str, index_file: str) -> RuntimeError:
    """Return the error for a shard whose content is another one than its index says."""
    return RuntimeError(
        f"Expected {shard} to be as it was indexed, got {what}. Its texts would be put to other images. Delete its index, "
        f"{index_file}, and start again: it is then built anew."
    )


def whole_address(shard: str) -> str:
    """Return where a shard is, without the signature that some addresses end with."""
    return shard.split("?", 1)[0] if is_remote(shard) else os.path.realpath(shard)


def check_index_is_ours(file: Path, paths: list[str], seen: list[list[Any]], shards: list[str]) -> None:
    """Raise if a file is the index of another set, which two runs would write in turn.

    Args:
        file: The file of the index.
        paths: Where its shards were. A local set that is no longer there was moved, or is not needed.
        seen: The stamps of these shards.
        shards: The shards that are opened.

    Raises:
        ValueError: if the other set is there, or if either is remote, and it is not the one that is opened.
    """
    if not paths or not set(paths).isdisjoint(whole_address(shard) for shard in shards):
        return
    if is_remote(paths[0]) or is_remote(shards[0]) or all(map(_is_there, paths, seen)):
        raise ValueError(
            f"Expected {file} to be the index of {shards[0]} and the shards beside it, got that of {paths[0]}. Name another "
            "file with `index`, or delete this one."
        )


def _is_there(path: str, seen: list[Any]) -> bool:
    return Path(path).is_file() and stamp(path) == seen


def default_index_path(shards: list[str]) -> Path:
    """Return the file of the index of local shards: beside the first."""
    if is_remote(shards[0]):
        raise ValueError(
            f"Expected `index`, the file in which to keep where each image is, because {shards[0]} is remote. It is "
            "written at the first use, which reads all shards once."
        )
    name = blake2b(
        "\n".join(Path(shard).name for shard in shards).encode("utf-8", "surrogatepass"), digest_size=4
    ).hexdigest()
    return Path(shards[0]).parent / f"{name}{INDEX_ENDING}"
