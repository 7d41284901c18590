"""How the learning rate goes up and down."""

import math
from collections.abc import Callable


def warmup_cosine(warmup: int, total: float) -> Callable[[int], float]:
    """Return the share of the learning rate at each optimizer step: a linear rise, then a cosine to zero.

    A function, no object: ``LambdaLR`` would keep an object's numbers in the checkpoint, and a run that is resumed with more
    epochs would still end where it was meant to.

    Args:
        warmup: Steps of the rise.
        total: Steps of the run; infinity, where no end is known, leaves the cosine out.

    Example:
        >>> share = warmup_cosine(warmup=1, total=3)
        >>> [round(share(step), 3) for step in range(4)]
        [0.5, 1.0, 0.5, 0.0]
    """

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if math.isinf(total):
            return 1.0
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, total - warmup)))

    return share
