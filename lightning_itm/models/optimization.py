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
    r"|(?P<stem>\w*embed\w*|cls_emb|(?:cls|reg|mask)_token|stem|conv_stem|conv\d|bn\d|ln_pre|norm_pre|patchnorm_pre_ln|shared)"
    r"|(?:resblocks|blocks?|stages|layers?)\.(?P<block>\d+)(?:\.(?:blocks\.)?(?P<inner>\d+))?"
    r"|layer(?P<stage>\d+)\.(?P<bottleneck>\d+)"  # of a ResNet
    r")(?=\.|$)"
)
_STEM, _TOP = (-1.0, 0.0), (math.inf, 0.0)


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


def layer_depths(tower: nn.Module) -> dict[str, int]:
    r"""Tell how many layers each trained parameter of a tower is below its top.

    The top (0) is what comes after the blocks: final norm, pooling, projection. The last block is 1, the first one of L
    blocks L, and embeddings and stem are L + 1. Blocks are those of open_clip's transformers and ResNets, of timm's trunks
    (in stages, a block each) and of Hugging Face's text towers, by their names; what has no such name is at the top.

    Args:
        tower: One tower, not two: layers of one number count as one.

    Returns:
        The depth of every parameter that requires a gradient, by name.

    Example:
        >>> blocks = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
        >>> layer_depths(nn.ModuleDict({"embedding": nn.Embedding(9, 4), "blocks": blocks, "norm": nn.RMSNorm(4)}))
        {'embedding.weight': 3, 'blocks.0.weight': 2, 'blocks.1.weight': 1, 'norm.weight': 0}
    """
    layers = {name: _layer(name) for name, parameter in tower.named_parameters() if parameter.requires_grad}
    order = sorted({*layers.values(), _TOP}, reverse=True)
    return {name: order.index(layer) for name, layer in layers.items()}


def split_by_depth(
    groups: Sequence[Mapping[str, Any]], depths: Mapping[nn.Parameter, int], learning_rate: float, decay: float
) -> list[dict[str, Any]]:
    r"""Split an optimizer's groups so that each has one depth, and the learning rate that belongs to it.

    .. math:: \eta_d = \eta\,\gamma^d

    Args:
        groups: Of parameters, with their options.
        depths: d of each parameter; who is not there is at the top, 0.
        learning_rate: η.
        decay: γ.

    Returns:
        Groups of the same options, from the top down.
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


def _layer(name: str) -> tuple[float, float]:
    found = _LAYER.search(name)
    if found is None or found["top"]:
        return _TOP
    if found["stem"]:
        return _STEM
    outer, inner = found["block"] or found["stage"], found["inner"] or found["bottleneck"]
    return float(outer), float(inner or 0)  # what stands between two stages belongs to the first block of the second
