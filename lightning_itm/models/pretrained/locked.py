"""Towers that stay as they are while the rest of the model is trained."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def keep_batch_statistics(tower: nn.Module) -> None:
    """Put those batch norms of a locked tower into eval mode that are locked: of which nothing is trained.

    Call it in ``train()``, because Lightning sets the mode of all parts after each validation.
    """
    for part in tower.modules():
        if isinstance(part, _BatchNorm) and not any(one.requires_grad for one in part.parameters()):
            part.eval()
