"""The settings of a loss in plain values, so that a checkpoint can make the loss again."""

import inspect
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn

from lightning_itm.losses.contrastive import InfoNCELoss, SigmoidLoss
from lightning_itm.losses.quintuplet import QuintupletLoss
from lightning_itm.losses.triplet import TripletLoss

LOSSES: dict[str, type[nn.Module]] = {
    loss.__name__: loss for loss in (InfoNCELoss, QuintupletLoss, SigmoidLoss, TripletLoss)
}


def loss_settings(loss: Any) -> dict[str, Any] | None:
    """Return the class and the arguments of a loss, as numbers, strings and dicts of them.

    They are what the loss has now, in case a setting was changed in the middle of a run. Trained values, such as
    ``logit_scale``, are weights and not among them.

    Args:
        loss: A loss. Those of :mod:`lightning_itm.losses` have settings, a subclass of the user's own has not.

    Returns:
        A dict for :func:`make_loss`, or None for a loss of the user's own.

    Example:
        >>> from lightning_itm import TripletLoss
        >>> from lightning_itm.losses.settings import loss_settings
        >>> loss_settings(TripletLoss(margin=0.1))["margin"]
        0.1
    """
    kind = type(loss)
    if LOSSES.get(kind.__name__) is not kind:
        return None
    settings: dict[str, Any] = {"class": kind.__name__}
    for name in inspect.signature(kind).parameters:
        value = loss.options[name] if name in getattr(loss, "options", {}) else getattr(loss, name)
        settings[name] = loss_settings(value) if isinstance(value, nn.Module) else _plain(value)
        if isinstance(value, nn.Module) and settings[name] is None:
            return None
    return settings


def make_loss(settings: Mapping[str, Any]) -> nn.Module:
    """Make the loss that :func:`loss_settings` described.

    Args:
        settings: What :func:`loss_settings` returned.

    Raises:
        ValueError: if there is no such loss, or if it has no such argument.

    Example:
        >>> from lightning_itm.losses.settings import make_loss
        >>> make_loss({"class": "TripletLoss", "margin": 0.1}).margin
        0.1
    """
    name = settings.get("class", "")
    if name not in LOSSES:
        raise ValueError(
            f"Expected a loss among {', '.join(sorted(LOSSES))}, got {name!r}, perhaps of a newer version of lightning_itm. "
            "Install it, or pass the loss, as in `load_from_checkpoint(path, loss=...)`."
        )
    values = {name: value for name, value in settings.items() if name != "class"}
    if unknown := sorted(values.keys() - inspect.signature(LOSSES[name]).parameters.keys()):
        raise ValueError(
            f"Expected arguments of {name}, got {unknown[0]!r}, perhaps of a newer version of lightning_itm. Install it, or "
            "pass the loss, as in `load_from_checkpoint(path, loss=...)`."
        )
    return LOSSES[name](
        **{name: make_loss(value) if isinstance(value, Mapping) else value for name, value in values.items()}
    )


def _plain(value: Any) -> Any:
    """Return a number of Python where there is one of numpy or a tensor, which a checkpoint would not load by default."""
    if isinstance(value, Tensor):
        value = value.item()
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value
