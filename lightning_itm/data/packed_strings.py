"""Many strings in one tensor."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


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
