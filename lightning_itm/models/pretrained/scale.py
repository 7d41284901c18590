"""The temperature and the bias of a model, which the loss owns while it trains."""

from torch import nn

from lightning_itm.export.scale import SCALE_NAMES


def freeze_scale(model: nn.Module) -> None:
    """Freeze the model's own scale and bias: DDP stops at parameters that are trained and not used."""
    for name, parameter in model.named_parameters(recurse=False):
        if name in SCALE_NAMES:
            parameter.requires_grad_(False)
