"""What stands in for the pairs of a stream that can't be read, in a run that can be resumed at any of them."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from lightning_itm.unreadable import UnreadablePairError, none_of, others

Key = TypeVar("Key")
Loaded = TypeVar("Loaded")

BLOCK = 256
"""Number of pairs among which a stand-in is drawn."""


def with_drawn_stand_ins(
    keys: Iterable[Key],
    load: Callable[[Key, Key], Loaded],
    *,
    what: str,
    report: Callable[[UnreadablePairError, Key], object],
    draw: Callable[[Key], Callable[[int], int]],
    num_skipped: int = 0,
) -> Iterator[Loaded]:
    """Load the things of a stream in order, and let one nearby, drawn at random, stand in for one that can't be read.

    The stream is cut into blocks of :data:`BLOCK` keys. A stand-in is drawn among the other keys of its block. Where none of
    these can be read, the next blocks are tried, and at the end of the stream the first one.

    Args:
        keys: One for each thing, such as its id with its bytes. A block of them is held at once.
        load: The function that loads the thing of its second argument, to stand at the place of its first.
        what: What is loaded, in the plural, for the message of the error. Such as ``"pairs"``.
        report: Called with each error and its key, to count or to warn.
        draw: Returns, for the key that can't be read, a function that draws a random integer below its argument.
        num_skipped: How many things are left out at the start, because a run that is resumed has seen them. All others are
            the same as without.

    Raises:
        UnreadablePairError: if nothing that could stand in can be read.
    """
    keys = iter(keys)
    blocks = iter(lambda: list(itertools.islice(keys, BLOCK)), [])
    first = next(blocks, [])
    # What was done before is read and never loaded, so it is not known which of it can be read. Blocks start where they did.
    ahead = deque(itertools.islice(itertools.chain([first], blocks), num_skipped // BLOCK, num_skipped // BLOCK + 1))
    num_skipped %= BLOCK
    while block := ahead.popleft() if ahead else next(blocks, []):
        for place in range(num_skipped, len(block)):
            yield _load_in_block(place, _growing(block, ahead, blocks, first), load, what, report, draw)
        num_skipped = 0


def _growing(
    block: list[Key], ahead: deque[list[Key]], blocks: Iterator[list[Key]], first: list[Key]
) -> Iterator[list[Key]]:
    """Yield a block, those after it, which are kept in ``ahead`` to be loaded later, and at the end the first one."""
    yield block
    yield from list(ahead)
    for later in blocks:
        ahead.append(later)
        yield later
    if first is not block:
        yield first


def _load_in_block(
    place: int,
    blocks: Iterator[list[Key]],
    load: Callable[[Key, Key], Loaded],
    what: str,
    report: Callable[[UnreadablePairError, Key], object],
    draw: Callable[[Key], Callable[[int], int]],
) -> Loaded:
    block = next(blocks)
    wanted, num_tried = block[place], 1
    try:
        return load(wanted, wanted)
    except UnreadablePairError as error:
        first_error = error
        report(error, wanted)
    draw_below = draw(wanted)
    orders = itertools.chain([(block, place)], ((later, None) for later in blocks))
    for candidates, own in orders:
        for other in others(own, len(candidates), draw_below):
            num_tried += 1
            try:
                return load(wanted, candidates[other])
            except UnreadablePairError as error:
                report(error, candidates[other])
    raise none_of(num_tried, what, first_error) from first_error
