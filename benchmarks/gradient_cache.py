"""What `chunk_size` saves in memory, and costs in time.

Memory: the most bytes of tensors that exist at once in a training step (forward and backward pass, no optimizer), weights,
gradients and the batch included. Every storage that an operator returns is counted until it is freed (a ``TorchDispatchMode``;
scratch space inside an operator is not seen). One pass of a small batch, and a large batch in chunks of that size. What the
large batch would take in one pass is extrapolated, on a line through the small batch and half of it.

Time: floating-point operations, counted, and the clock: steps in one pass and in chunks take turns, after one of each
to warm up; the ratio is the median over the pairs, and its spread says how far to trust it on a shared machine. This is of a
smaller model and batch, whose one pass fits into 8 GB. The difference of their gradients is the largest of any weight, over
the largest gradient of its tensor.

Inputs are noise, of the shapes the model takes. ViT-B-32 at 1,024 took ten minutes on one core, in a process of 7 GB.

    python benchmarks/gradient_cache.py
"""

import argparse
import gc
import logging
import statistics
import time
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lightning_itm import OpenCLIPDualEncoder

Batch = dict[str, Tensor]


def noise(model: OpenCLIPDualEncoder, batch_size: int) -> Batch:
    """Return a batch of the shapes that the model takes."""
    size = model.model.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    ids = torch.arange(batch_size)
    text = torch.randint(1, model.model.vocab_size - 1, (batch_size, model.model.context_length))
    return {"image": torch.randn(batch_size, 3, height, width), "text": text, "image_id": ids, "text_id": ids}


def step(model: OpenCLIPDualEncoder, batch: Batch, chunk_size: int | None) -> None:
    """Compute the gradients of a batch."""
    model.zero_grad()
    model.chunk_size = chunk_size
    loss: Any = model.training_step(batch, 0)
    loss.backward()


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all storages, from the operator that returns them until they are freed."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: set[int] = set()
        self.now = self.peak = 0
        for tensor in tensors:
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address not in self.alive:
            self.alive.add(address)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self.alive.discard(address)
        self.now -= size


def peak_bytes(model: OpenCLIPDualEncoder, batch_size: int, chunk_size: int | None) -> int:
    """Return the most bytes that existed at once in a step."""
    batch = noise(model, batch_size)
    model.zero_grad()
    gc.collect()
    live = LiveBytes(*model.parameters(), *model.buffers(), *batch.values())
    with live:
        step(model, batch, chunk_size)
    return live.peak


def measure_memory(name: str, batch_size: int, chunk_size: int) -> None:
    """Print the peaks."""
    torch.manual_seed(0)
    model = OpenCLIPDualEncoder(name)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{name}, {millions:.0f} million parameters, float32, {torch.get_num_threads()} threads", flush=True)
    half, small = (peak_bytes(model, rows, None) / 1e9 for rows in (chunk_size // 2, chunk_size))
    print(f"batch {chunk_size} in one pass: {small:.2f} GB (half of it: {half:.2f} GB)", flush=True)
    extrapolated = half + (small - half) * (2 * batch_size / chunk_size - 1)
    start = time.perf_counter()
    large = peak_bytes(model, batch_size, chunk_size) / 1e9
    inputs = sum(tensor.numel() * tensor.element_size() for tensor in noise(model, batch_size).values()) / 1e9
    print(
        f"batch {batch_size} in chunks of {chunk_size}: {large:.2f} GB, {inputs:.2f} GB of it the batch itself: "
        f"{large / small:.2f} x batch {chunk_size} in one pass ({time.perf_counter() - start:.0f} s)"
    )
    print(f"batch {batch_size} in one pass, extrapolated: {extrapolated:.0f} GB", flush=True)


def operations(model: OpenCLIPDualEncoder, batch: Batch, chunk_size: int | None) -> int:
    """Count the floating-point operations of a step."""
    with FlopCounterMode(display=False) as counter:
        step(model, batch, chunk_size)
    return int(counter.get_total_flops())


def measure_time(name: str, batch_size: int, chunk_size: int, runs: int) -> None:
    """Print the ratio of the times, and the difference of the gradients."""
    torch.manual_seed(0)
    model = OpenCLIPDualEncoder(name)
    batch = noise(model, batch_size)
    seconds: dict[int | None, list[float]] = {None: [], chunk_size: []}
    gradients: dict[int | None, list[Tensor]] = {}
    few = noise(model, 8)
    print(f"operations in chunks: {operations(model, few, 4) / operations(model, few, None):.2f} x one pass")
    for run in range(-1, runs):
        for size, taken in seconds.items():
            start = time.perf_counter()
            step(model, batch, size)
            if run >= 0:  # the first pair warms up
                taken.append(time.perf_counter() - start)
            gradients[size] = [one.grad for one in model.parameters() if one.grad is not None]
    ratios = sorted(chunked / plain for plain, chunked in zip(*seconds.values(), strict=True))
    pairs = zip(*gradients.values(), strict=True)
    difference = max(float((chunked - plain).abs().max() / plain.abs().max()) for plain, chunked in pairs)
    print(f"{name}, batch {batch_size}: {statistics.median(seconds[None]):.1f} s a step in one pass")
    spread = f"from {ratios[0]:.2f} to {ratios[-1]:.2f} in {runs} pairs"
    print(f"in chunks of {chunk_size}: {statistics.median(ratios):.2f} x, {spread}")
    print(f"gradients differ by {difference:.1e} at most", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="whose memory is measured")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--chunk-size", type=int, default=64)
    parser.add_argument("--time-model", default="ViT-S-32-alt", help="whose time is measured")
    parser.add_argument("--time-batch-size", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.ERROR)  # open_clip's word on random weights
    torch.set_num_threads(args.threads)
    measure_memory(args.model, args.batch_size, args.chunk_size)
    measure_time(args.time_model, args.time_batch_size, args.chunk_size, args.runs)


if __name__ == "__main__":
    main()
