"""What the benchmarks of a GPU share: clocks that wait for the device, peak memory, a table that is printed and kept."""

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

CELL = str | float


def synchronize(device: str) -> None:
    """Wait for the device, if it is one to wait for."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(way: Callable[[], object], device: str) -> float:
    """Return the seconds from call to result."""
    synchronize(device)
    start = time.perf_counter()
    way()
    synchronize(device)
    return time.perf_counter() - start


def peak_memory(way: Callable[[], object], device: str) -> float:
    """Return the most bytes allocated at once, beyond what was before; NaN where nobody counts."""
    if device != "cuda":
        way()
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before)


class Report:
    """A table, row by row: to the screen at once, and to a file, so that a run that breaks off leaves what it has."""

    def __init__(self, device: str, out: str | None, *columns: tuple[str, int]) -> None:
        self.out, self.columns = None if out is None else Path(out), columns
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text("")
        name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, no result: a trial run"
        self._write(f"{name}; PyTorch {torch.__version__}")
        self._write("".join(self._cell(title, title, width) for title, width in columns))

    def row(self, *values: CELL) -> None:
        """Write a row."""
        cells = zip(values, self.columns, strict=True)
        self._write("".join(self._cell(value, title, width) for value, (title, width) in cells))

    def close(self, note: str) -> None:
        """Write a last line."""
        self._write(note)

    def _cell(self, value: CELL, title: str, width: int) -> str:
        is_left = title == self.columns[0][0] or width >= 20
        shown = value if isinstance(value, str) else f"{value:.4g}"
        return f"{shown:{'<' if is_left else '>'}{width}}"

    def _write(self, line: str) -> None:
        print(line, flush=True)
        if self.out is not None:
            with self.out.open("a") as file:
                file.write(line + "\n")
