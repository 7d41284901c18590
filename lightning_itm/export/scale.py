"""The temperature of a model: the loss trains it, and the model is exported with it."""

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

SCALE_NAMES = ("logit_scale", "logit_bias")


@torch.no_grad()
def take_scale(loss: Any, model: Any) -> None:
    """Copy the scale and the bias of a pretrained model into a loss that was given none.

    Args:
        loss: The loss of a batch. One that has no scale, or was given its own, keeps what it has.
        model: A model with ``logit_scale`` and, as SigLIP, ``logit_bias``.
    """
    if not getattr(loss, "takes_pretrained_scale", False):
        return
    names = [name for name in SCALE_NAMES if hasattr(loss, name)]
    theirs = [parameter for name in names if _is_whole(parameter := getattr(model, name, None))]
    if len(theirs) == len(names):  # a scale without its bias would be of another loss
        for name, parameter in zip(names, theirs, strict=True):
            getattr(loss, name).copy_(parameter.reshape(()))
        loss.takes_pretrained_scale = False  # from here on it is trained: another model must not overwrite it


@torch.no_grad()
def return_scale(loss: nn.Module, model: Any) -> None:
    """Copy the trained scale and bias of a loss into the parameters of a model, where both have them.

    Args:
        loss: The loss of a batch. One that trains no scale changes nothing.
        model: A model with ``logit_scale`` and, as SigLIP, ``logit_bias``.
    """
    for name, value in trained_scale(loss).items():
        parameter = getattr(model, name, None)
        if _is_whole(parameter):
            parameter.copy_(value.reshape(parameter.shape))


def trained_scale(loss: nn.Module) -> dict[str, Tensor]:
    """Return ``logit_scale`` and ``logit_bias`` of a loss as it uses them, as far as it has them.

    The last step of a run may have led the scale out of its range. The loss brings it back when it is computed next.
    """
    found = {name: getattr(loss, name, None) for name in SCALE_NAMES}
    scale = {name: value.detach() for name, value in found.items() if _is_whole(value)}
    highest = getattr(loss, "max_logit_scale", None)
    if "logit_scale" in scale and highest is not None:
        scale["logit_scale"] = scale["logit_scale"].clamp(0, highest)
    return scale


def _is_whole(value: Any) -> TypeGuard[Tensor]:
    # Where a strategy shards weights, their values are not here, or in part. It gives whole ones to a checkpoint.
    return isinstance(value, Tensor) and value.numel() == 1 and not hasattr(value, "device_mesh")
