"""How fast each weight learns: warm-up and cosine over the steps, decay over the layers of a tower."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

# The leftmost that is found in a name decides: a convolution of a block belongs to the block, one before all blocks to the
# stem, and an attention pool has position embeddings of its own.
_LAYER = re.compile(
    r"(?:^|\.)(?:"
    r"(?P<top>\w*pool\w*|head)"
    r"|(?P<stem>\w*embed\w*|cls_emb|(?:cls|reg|mask)_token|stem|conv_stem|conv\d|bn\d|ln_pre|pre_layrnorm|norm_pre|patchnorm_pre_ln|shared)"
    r"|(?:resblocks|blocks?|stages|layers?)\.(?P<block>\d+)(?:\.(?:blocks\.)?(?P<inner>\d+))?"
    r"|layer(?P<stage>\d+)\.(?P<bottleneck>\d+)"  # of a ResNet
    r")(?=\.|$)"
)
_STEM, _TOP = (-1.0, 0.0), (math.inf, 0.0)


def warmup_cosine(warmup: int, total: float) -> Callable[[int], float]:
    """Return a function from the optimizer step to the factor of the learning rate: a linear rise, then a cosine to zero.

    Args:
        warmup: The number of steps of the rise. The factor is 1 in the step after them.
        total: The number of steps of the run. Pass infinity if it is not known: the factor then stays 1 after the rise.

    Example:
        >>> from lightning_itm.models.optimization import warmup_cosine
        >>> factor = warmup_cosine(warmup=1, total=3)
        >>> [round(factor(step), 3) for step in range(4)]
        [0.5, 1.0, 0.5, 0.0]
    """

    # A function and not an object: `LambdaLR` would keep an object's numbers in the checkpoint, and a run that is resumed
    # with more epochs would still end where it was meant to end at first.
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if math.isinf(total):
            return 1.0
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, total - warmup)))

    return factor


def decay_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Split the trained parameters into a group with the optimizer's weight decay, and one without.

    Norms, biases and scalars such as ``logit_scale`` have fewer than two dimensions and no decay: a pull to zero would only
    rescale what they adjust.

    Args:
        module: The model, of which only parameters that require a gradient are taken.

    Raises:
        ValueError: if all parameters are frozen.

    Example:
        >>> from torch import nn
        >>> from lightning_itm.models.optimization import decay_groups
        >>> [len(group["params"]) for group in decay_groups(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))]
        [1, 3]
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("Expected a parameter that is trained, got none: all are frozen. Leave one tower unlocked.")
    return [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2]},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]


def layer_depths(tower: nn.Module) -> dict[str, int]:
    r"""Tell how many layers each trained parameter of a tower is below its top.

    The top (0) is what comes after the blocks: final norm, pooling, projection. The last block is 1, the first one of L
    blocks is L, and embeddings and stem are L + 1. Blocks are found by their names: those of open_clip's transformers and
    ResNets, of timm's trunks (in stages, each block by itself) and of Hugging Face's text towers. What has no such name is at
    the top.

    Args:
        tower: One tower. Do not pass a whole model, because layers with the same number count as one.

    Returns:
        The depth of every parameter that requires a gradient, by name.

    Example:
        >>> from torch import nn
        >>> from lightning_itm.models.optimization import layer_depths
        >>> blocks = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
        >>> layer_depths(nn.ModuleDict({"embedding": nn.Embedding(9, 4), "blocks": blocks, "norm": nn.RMSNorm(4)}))
        {'embedding.weight': 3, 'blocks.0.weight': 2, 'blocks.1.weight': 1, 'norm.weight': 0}
    """
    layers = {name: _layer(name) for name, parameter in tower.named_parameters() if parameter.requires_grad}
    # From the top down. The top is listed even if nothing of it is trained, so that the last block is 1 in any case.
    order = sorted({*layers.values(), _TOP}, reverse=True)
    return {name: order.index(layer) for name, layer in layers.items()}


def split_by_depth(
    groups: Sequence[Mapping[str, Any]], depths: Mapping[nn.Parameter, int], learning_rate: float, decay: float
) -> list[dict[str, Any]]:
    r"""Split an optimizer's groups so that each has one depth, and the learning rate of that depth.

    .. math:: \eta_d = \eta\,\gamma^d

    Args:
        groups: The groups of an optimizer, such as :func:`decay_groups` returns them. Their options are kept.
        depths: The depth d of each parameter. A parameter that is not in it is at the top, depth 0.
        learning_rate: The learning rate η at the top.
        decay: The factor γ per layer, in (0, 1], such as 0.8.

    Returns:
        Groups with the same options, in the order of ``groups`` and, within each, from the top down.
    """
    return [
        {
            **group,
            "params": [parameter for parameter in group["params"] if depths.get(parameter, 0) == depth],
            "lr": learning_rate * decay**depth,
        }
        for group in groups
        for depth in sorted({depths.get(parameter, 0) for parameter in group["params"]})
    ]


def check_layer_decay(layer_decay: float | None) -> None:
    """Raise a ValueError if the factor per layer is not in (0, 1], or None."""
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(
            f"Expected `layer_decay` to be in (0, 1], got {layer_decay}. It multiplies the learning rate at each layer "
            "on the way down; freeze a tower with `lock_image` or `lock_text`."
        )


def split_towers_by_depth(
    groups: list[dict[str, Any]], towers: Mapping[str, nn.Module], learning_rate: float, decay: float | None
) -> list[dict[str, Any]]:
    """Split an optimizer's groups with :func:`split_by_depth`, where each tower counts its own layers.

    Args:
        groups: The groups of an optimizer, so that weight decay and its exceptions stay as they are.
        towers: The towers of the model.
        learning_rate: The learning rate at the top.
        decay: The factor per layer. At 1 or ``None`` the groups stay as they are.
    """
    if decay in (None, 1):
        return groups
    depths: dict[nn.Parameter, int] = {}
    for tower in towers.values():
        of_name = dict(tower.named_parameters())
        depths |= {of_name[name]: depth for name, depth in layer_depths(tower).items()}
    return split_by_depth(groups, depths, learning_rate, decay)


def is_in_block(name: str) -> bool:
    """Return whether a part of a tower belongs to one of its blocks, by its name, as :func:`layer_depths` finds them."""
    return _layer(name) not in (_STEM, _TOP)


def _layer(name: str) -> tuple[float, float]:
    found = _LAYER.search(name)
    if found is None or found["top"]:
        return _TOP
    if found["stem"]:
        return _STEM
    outer, inner = found["block"] or found["stage"], found["inner"] or found["bottleneck"]
    return float(outer), float(inner or 0)  # what stands between two stages belongs to the first block of the second
