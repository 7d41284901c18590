"""Inputs and outputs of the published code of false negative elimination, step by step."""

from pathlib import Path

import numpy as np
import torch

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("fne_*.npz"))


def golden_steps(path):
    """Each step's arrays under their own names, with the file's settings."""
    arrays = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
    settings = {name: value.item() for name, value in arrays.items() if value.ndim == 0 and name[0] != "s"}
    for step in range(int(arrays["steps"])):
        prefix = f"s{step:02d}_"
        yield settings, {name[4:]: value for name, value in arrays.items() if name.startswith(prefix)}
