"""The learned temperature and bias, which a pretrained model brings and the loss owns while it trains."""

import torch
from torch import Tensor, nn

NAMES = ("logit_scale", "logit_bias")


def hand_over_scale(model: nn.Module, loss: nn.Module) -> None:
    """Copy the scale and the bias of a pretrained model into the loss.

    Losses that have no scale, and those that were given one, keep what they have. So do losses with a bias if the model has
    none: a scale without its bias would be of another loss.

    Args:
        model: The pretrained model, with ``logit_scale`` and perhaps ``logit_bias``.
        loss: The loss of the :class:`~lightning_itm.DualEncoder`.
    """
    if not getattr(loss, "takes_pretrained_scale", False):
        return
    names = [name for name in NAMES if hasattr(loss, name)]
    theirs = [parameter for name in names if (parameter := getattr(model, name, None)) is not None]
    if len(theirs) == len(names):
        with torch.no_grad():
            for name, parameter in zip(names, theirs, strict=True):
                getattr(loss, name).copy_(parameter.reshape(()))


def freeze_scale(model: nn.Module) -> None:
    """Freeze the model's own scale and bias: DDP stops at parameters that are trained and not used."""
    for name, parameter in model.named_parameters(recurse=False):
        if name in NAMES:
            parameter.requires_grad_(False)


def scale_of_loss(loss: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """Return the trained scale and bias in the shapes in which the model has them.

    Args:
        loss: The loss, whose values are taken.
        model: The model that is saved. What it does not have is left out, and so is what the loss does not have.
    """
    both = [name for name in NAMES if isinstance(getattr(model, name, None), Tensor) and hasattr(loss, name)]
    return {name: getattr(loss, name).detach().reshape(getattr(model, name).shape).clone() for name in both}
