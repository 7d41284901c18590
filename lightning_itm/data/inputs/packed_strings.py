"""Many strings in one tensor, which processes map instead of copying."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor


class PackedStrings(Sequence[str]):
    """Hold many strings in one tensor of bytes. A list of a million strings would be copied into every worker.

    Args:
        data: All strings in UTF-8, one after the other, as uint8 `(bytes,)`.
        end: Where each string ends, int64 `(strings,)`.

    Example:
        >>> from lightning_itm.data.inputs.packed_strings import PackedStrings
        >>> strings = PackedStrings.pack(["a dog", "", "über"])
        >>> len(strings), strings[-1], list(strings[:2])
        (3, 'über', ['a dog', ''])
    """

    def __init__(self, data: Tensor, end: Tensor) -> None:
        self.data, self.end = data, end

    @classmethod
    def pack(cls, strings: Iterable[str]) -> "PackedStrings":
        """Pack strings into a tensor."""
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]  # names of files may be no UTF-8
        data = torch.frombuffer(bytearray(b"".join(encoded)) or bytearray(1), dtype=torch.uint8)  # not of an empty one
        return cls(data, torch.tensor([len(part) for part in encoded], dtype=torch.int64).cumsum(0))

    def __len__(self) -> int:
        return len(self.end)

    def __iter__(self) -> Iterator[str]:
        # Ten times as fast as one index after the other, each of which reads two tensors.
        data, start = memoryview(cast("Any", self.data.numpy())), 0
        for end in self.end.tolist():
            yield str(data[start:end], "utf-8", "surrogatepass")
            start = end

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[other] for other in range(*index.indices(len(self)))]
        num = len(self.end)  # once: each question to a tensor costs a microsecond
        if not -num <= index < num:
            raise IndexError(f"Expected an index below {num}, got {index}.")
        index %= num
        start, end = self.end[index - 1 : index + 1].tolist() if index else (0, int(self.end[0]))
        return str(memoryview(cast("Any", self.data.numpy()))[start:end], "utf-8", "surrogatepass")
