"""The methods that negatives.py compares: a loss, and callbacks that bring its negatives."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_itm import (
    FalseNegativeElimination,
    FalseNegativeSampler,
    InfoNCELoss,
    OfflineHardNegativeMining,
    QuintupletLoss,
    SigmoidLoss,
    TripletLoss,
)


@dataclass(frozen=True)
class Method:
    """A loss, and callbacks that bring negatives."""

    loss: Callable[[], nn.Module] = InfoNCELoss
    callbacks: Callable[[int], list[Callback]] = lambda _: []
    epochs: float = 1.0
    """So many times the epochs of the setting."""


def mining(**options: Any) -> Callable[[int], list[Callback]]:
    """Return what makes a mining callback."""
    defaults: dict[str, Any] = {"texts_per_image": 60, "images_per_text": 60, "num_workers": 0}
    return lambda seed: [OfflineHardNegativeMining(**{**defaults, **options}, seed=seed)]


def bank(queue_size: int, **options: Any) -> Callable[[int], list[Callback]]:
    """Return what makes a memory bank, and of options those of its sampler."""
    return lambda seed: [FalseNegativeElimination(queue_size, sampler=FalseNegativeSampler(seed=seed, **options))]


def both(*makers: Callable[[int], list[Callback]]) -> Callable[[int], list[Callback]]:
    """Put callbacks together."""
    return lambda seed: [callback for maker in makers for callback in maker(seed)]


def batches(group_size: int = 4, **options: Any) -> Callable[[int], list[Callback]]:
    """Return what makes a callback that composes hard batches."""
    return mining(inject="batches", group_size=group_size, **options)


def hardness(value: float) -> Callable[[], nn.Module]:
    """Return what makes InfoNCE with hardness weights."""
    return functools.partial(InfoNCELoss, hardness=value)


def triplet(**options: Any) -> Callable[[], nn.Module]:
    """Return what makes a triplet loss."""
    return functools.partial(TripletLoss, **options)


def quintuplet() -> nn.Module:
    """Make the loss of AOQ, whose term within the batch takes the hardest negative."""
    return QuintupletLoss(TripletLoss())


METHODS: dict[str, Method] = {
    "InfoNCE": Method(),
    "sigmoid": Method(SigmoidLoss),
    "hardest": Method(triplet()),
    "selective": Method(triplet(negatives="selective")),
    "selective, FNE": Method(triplet(negatives="selective", memory="instead"), bank(4096, weighting="drop")),
    "AOQ": Method(quintuplet, mining(relative_margin=0.05)),
    "hardness 3": Method(hardness(3.0)),
    "hardness 9": Method(hardness(9.0)),
    "batches of 4": Method(callbacks=batches()),
    "batches of 4, training": Method(callbacks=batches(encode="training")),
    "bank": Method(callbacks=lambda _: [FalseNegativeElimination()]),
    "bank 512": Method(callbacks=bank(512)),
    "bank 8192": Method(callbacks=bank(8192)),
    "samples": Method(callbacks=mining(relative_margin=0.05)),
    "embeddings": Method(callbacks=mining(inject="embeddings", relative_margin=0.05)),
    "batches of 4, mined once": Method(callbacks=batches(every_n_epochs=None, batch_size=50)),
    "batches of 4, every 4th epoch": Method(callbacks=batches(every_n_epochs=4)),
    "bank, batches of 4": Method(callbacks=both(bank(2048), batches())),
}


def methods_of(name: str) -> Method:
    """Return a method by its name, or for a longer time: ``"InfoNCE, 1.5 x"``."""
    if name in METHODS:
        return METHODS[name]
    method, _, factor = name.rpartition(", ")
    if method in METHODS and factor.endswith(" x"):
        return replace(METHODS[method], epochs=float(factor[:-2]))
    raise ValueError(
        f"Expected one of {list(METHODS)}, or one of them with a factor such as 'InfoNCE, 1.5 x', got {name!r}."
    )
