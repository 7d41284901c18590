"""Inputs that can't be read: what stands in for them, and how many of them a set may have."""

import itertools
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

Key = TypeVar("Key")
Loaded = TypeVar("Loaded")


class UnreadablePairError(RuntimeError):
    """Tell that a pair can't be used: its image does not open, or its text is empty."""


def with_stand_ins(
    attempts: Iterable[tuple[Key, Callable[[], Loaded]]],
    *,
    what: str,
) -> Iterator[tuple[Loaded, Key, bool]]:
    """Load one thing after the other, and let a neighbour stand in for one that can't be read.

    For evaluation, where what stands in is marked and never used. So every key comes once, and the number of samples is known
    beforehand. The next thing that can be read stands in. At the end, it is the last one that could be read.

    Args:
        attempts: One key for each thing, such as its id, and the function that loads it.
        what: What is loaded, in the plural, for the message of the error. Such as ``"images"``.

    Yields:
        What was loaded, the key that it is for, and whether it is the key's own.

    Raises:
        UnreadablePairError: if nothing at all can be read.

    Example:
        >>> from lightning_itm.unreadable import UnreadablePairError, with_stand_ins
        >>> def load(name):
        ...     if name == "broken":
        ...         raise UnreadablePairError(name)
        ...     return name.upper()
        >>> list(with_stand_ins([(0, lambda: load("broken")), (1, lambda: load("dog"))], what="images"))
        [('DOG', 1, True), ('DOG', 0, False)]
    """
    loaded: list[Loaded] = []  # the last thing that could be read, or none
    waiting: list[Key] = []  # only the keys: the bytes of what is broken would pile up
    first_error: UnreadablePairError | None = None
    for key, load in attempts:
        try:
            loaded = [load()]
        except UnreadablePairError as error:
            first_error = first_error or error
            waiting.append(key)
            continue
        yield loaded[0], key, True
        yield from ((loaded[0], other, False) for other in waiting)
        waiting = []
    if waiting and not loaded:
        raise none_of(len(waiting), what, first_error) from first_error
    yield from ((loaded[0], other, False) for other in waiting)


def load_or_other(
    load: Callable[[int], Loaded],
    index: int,
    num: int,
    *,
    what: str,
    report: Callable[[UnreadablePairError, int], object] | None = None,
    draw: Callable[[int], int] = random.randrange,
) -> tuple[Loaded, bool]:
    """Load the thing at an index, or else another one that can be read, drawn at random.

    Drawn and not the next one: where a whole folder is missing, one neighbour would stand in for all of it.

    Args:
        load: The function that loads the thing at an index.
        index: The index that is wanted. A negative one counts from the end.
        num: The number of things there are, such as the length of a dataset.
        what: What is loaded, in the plural, for the message of the error. Such as ``"images"``.
        report: Called with each error and its index, to count or to warn. By default, errors are only replaced.
        draw: Returns a random integer below its argument. Default: from Python's stream, which
            :func:`~lightning_itm.randomness.seeded` makes a function of seed, epoch and index.

    Returns:
        What was loaded, and whether it is the wanted one.

    Raises:
        UnreadablePairError: if nothing at all can be read.

    Example:
        >>> from lightning_itm.unreadable import UnreadablePairError, load_or_other
        >>> def load(index):
        ...     if index != 1:
        ...         raise UnreadablePairError(f"thing {index} is broken")
        ...     return f"thing {index}"
        >>> load_or_other(load, 2, 3, what="things")
        ('thing 1', False)
    """
    index %= num
    first_error: UnreadablePairError | None = None
    for other in itertools.chain([index], others(index, num, draw)):
        try:
            return load(other), other == index
        except UnreadablePairError as error:
            first_error = first_error or error
            if report is not None:
                report(error, other)
    raise none_of(num, what, first_error) from first_error


def others(index: int | None, num: int, draw: Callable[[int], int]) -> Iterator[int]:
    """Yield each number below ``num`` once, but for ``index``, in a random order that takes no memory.

    Args:
        index: The number that is left out, or None.
        num: Numbers from 0 to below this one come.
        draw: Returns a random integer below its argument.
    """
    start, step = draw(num), 1 + draw(num)
    while math.gcd(step, num) > 1:  # only a step without a common divisor meets all numbers
        step = 1 + draw(num)
    order = ((start + number * step) % num for number in range(num))
    yield from (other for other in order if other != index)


def none_of(num: int, what: str, error: Exception | None) -> UnreadablePairError:
    """Return the error that says that none of ``num`` things can be read, and what is wrong with the first."""
    return UnreadablePairError(
        f"None of the {num} {what} can be read. The first: {error}. Is the path of the images right?"
    )


class PairMarks:
    """Mark pairs of a set and count them, each once, in memory that all processes share.

    Args:
        num_pairs: Number of pairs of the set. Each takes one byte.

    Example:
        >>> from lightning_itm.unreadable import PairMarks
        >>> marks = PairMarks(10)
        >>> marks.add(7), marks.add(7), len(marks), marks.first(3)
        (True, False, 1, [7])
    """

    def __init__(self, num_pairs: int) -> None:
        # Shared, so that workers mark, and the main process sees it. A byte for each: two workers can't disturb each other.
        self._is_marked = torch.zeros(num_pairs, dtype=torch.bool).share_memory_()  # (pairs,)
        self._is_told = torch.zeros(1, dtype=torch.bool).share_memory_()

    def add(self, index: int) -> bool:
        """Mark a pair, and return whether it was not marked before."""
        is_new = not self._is_marked[index]
        self._is_marked[index] = True
        return is_new

    def is_first(self) -> bool:
        """Return True at the first call, whatever worker it comes from, and then False."""
        is_first = not self._is_told[0]
        self._is_told[0] = True
        return is_first

    def __len__(self) -> int:
        return int(self._is_marked.count_nonzero())

    def first(self, num: int) -> list[int]:
        """Return the numbers of the first pairs that are marked, at most ``num``."""
        # Of a copy: `nonzero` counts and then writes, and a worker that marks in between would let it write too far.
        numbers: list[int] = self._is_marked.clone().nonzero().squeeze(1)[:num].tolist()
        return numbers


class UnreadablePairs(PairMarks):
    """Count the pairs of a set that can't be read, warn at the first, and end the run where there are too many.

    Args:
        num_pairs: Number of pairs of the set.
        max_fraction: The fraction of them that may be unreadable.

    Raises:
        ValueError: if ``max_fraction`` is not between 0 and 1.
    """

    def __init__(self, num_pairs: int, max_fraction: float) -> None:
        if not 0 <= max_fraction <= 1:
            raise ValueError(
                f"Expected `max_unreadable` to be from 0 to 1, a fraction of the pairs, got {max_fraction}."
            )
        super().__init__(num_pairs)
        self.num_pairs, self.max_fraction = num_pairs, max_fraction
        self._marks_to_count = 1  # of this process

    def report(self, error: Exception, index: int) -> None:
        """Count a pair that can't be read.

        Args:
            error: What is wrong with it.
            index: The number of the pair.

        Raises:
            RuntimeError: if more pairs than ``max_fraction`` can't be read.
        """
        if not self.add(index):
            return
        # A count reads all marks, which takes a while for millions. It comes when 16 workers could be past the limit.
        self._marks_to_count -= 1
        count = len(self) if self._marks_to_count <= 0 else 0
        limit = self.max_fraction * self.num_pairs
        if count:
            self._marks_to_count = max(1, int(limit - count) // 16)
        if count > limit:
            raise RuntimeError(
                f"Expected at most {self.max_fraction:.1%} of the {self.num_pairs} pairs to be unreadable "
                f"(`max_unreadable`), got {count}, the pairs {', '.join(map(str, self.first(5)))} among them. "
                f"{error}. Repair them, leave them out, or give a larger `max_unreadable`."
            ) from error
        # All workers together warn once. A thousand broken files would fill the log.
        if self.is_first():
            warnings.warn(
                f"{error}. Another pair takes its place. Further ones are counted in "
                "`ImageTextDataset.num_replaced` and not reported.",
                stacklevel=5,  # past `ImageTextDataset.report`, the loading and `__getitem__`: where the pair was asked for
            )
