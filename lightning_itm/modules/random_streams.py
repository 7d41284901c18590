"""The state of the random streams that a training step draws from."""

import random
from typing import Any

import numpy as np
import torch


def random_streams() -> dict[str, Any]:
    """Return the state of PyTorch's streams (CPU and current CUDA device), Python's and NumPy's: tensors and plain numbers."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }


def restore_random_streams(state: dict[str, Any]) -> None:
    """Go on as the state says."""
    version, words, gauss = state["python"]
    name, keys, *rest = state["numpy"]
    torch.set_rng_state(state["torch"].cpu())
    random.setstate((version, tuple(words), gauss))
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def part_random_streams(rank: int) -> None:
    """Let the other ranks draw other numbers than rank 0, whose streams a checkpoint has."""
    if rank > 0:
        seed = int(torch.randint(2**31, ())) + rank
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
