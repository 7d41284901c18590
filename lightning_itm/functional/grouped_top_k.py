"""The best keys of each group of keys, without the scores of all the others."""

from importlib.util import find_spec
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from lightning_itm.functional.precision import products


class GroupedKeys(NamedTuple):
    """Keys in groups: what :func:`group_maxima` searches. Made once by :func:`group_keys`, for all anchors."""

    keys: Float[Tensor, "rows dim"]
    """Row ``g * group_size + j`` is the key ``j * groups + g``, or zeros where there is none."""
    key_id: Int[Tensor, " rows"] | None
    """The image each row belongs to."""
    num_keys: int
    group_size: int

    @property
    def num_groups(self) -> int:
        """The number of groups."""
        return len(self.keys) // self.group_size


def group_keys(
    keys: Float[Tensor, "keys dim"], group_size: int, key_id: Int[Tensor, " keys"] | None = None
) -> GroupedKeys:
    r"""Put keys into ⌈keys / ``group_size``⌉ groups.

    The group of number :math:`g` has the keys :math:`g`, :math:`g + \text{groups}`, :math:`g + 2\,\text{groups}` and so on:
    neighbours, such as the texts of one image, are in different ones.

    Args:
        keys: Embeddings of what is searched.
        group_size: Keys per group, a power of two.
        key_id: The image each key belongs to.

    Raises:
        ValueError: ``group_size`` is not a power of two.
    """
    if group_size < 1 or group_size & (group_size - 1):
        raise ValueError(f"Expected `group_size` to be a power of two, got {group_size}.")
    num_groups = -(-len(keys) // group_size)
    missing = group_size * num_groups - len(keys)

    def grouped(rows: Tensor) -> Tensor:
        padded = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
        return padded.view(group_size, num_groups, *rows.shape[1:]).transpose(0, 1).flatten(0, 1)

    return GroupedKeys(grouped(keys), None if key_id is None else grouped(key_id), len(keys), group_size)


def group_maxima(
    anchors: Float[Tensor, "anchors dim"],
    grouped: GroupedKeys,
    *,
    depth: int = 1,
    anchor_id: Int[Tensor, " anchors"] | None = None,
    memory_budget: int = 256 << 20,
) -> Int[Tensor, "depth anchors groups"]:
    """Find the ``depth`` best keys of each group, for each anchor.

    Products are of the embeddings' own type, summed in float32. On CUDA, a kernel writes these scores and no others.
    Elsewhere, and without Triton, it is done in chunks.

    Args:
        anchors: Embeddings, of the type of the keys.
        grouped: The keys, from :func:`group_keys`.
        depth: How many keys of each group are kept, typically 3.
        anchor_id: The image each anchor belongs to. A key of the anchor's own image is no candidate.
        memory_budget: Bytes that scores may take at once, where there is no kernel.

    Returns:
        Score and place in the group in one number, for :func:`unpack`: the larger, the better.

    Example:
        >>> import torch
        >>> from lightning_itm.functional.grouped_top_k import group_keys, group_maxima, unpack
        >>> keys = group_keys(torch.tensor([[0.5, 0], [0.25, 0], [1, 0]]), group_size=2)
        >>> unpack(group_maxima(torch.tensor([[1.0, 0.0]]), keys), group_size=2)
        (tensor([[[1.0000, 0.2500]]]), tensor([[[1, 0]]]))
    """
    keys, key_id, num_keys, group_size = grouped
    if anchors.is_cuda and find_spec("triton") is not None:
        from lightning_itm.functional._grouped_top_k_triton import (
            group_maxima_kernel,
        )  # Triton takes a while, and is not everywhere

        return group_maxima_kernel(anchors, keys, num_keys, group_size, depth, anchor_id, key_id)
    num_groups = grouped.num_groups
    member = torch.arange(group_size, dtype=torch.int32, device=keys.device).repeat(num_groups)
    is_missing = member * num_groups + torch.arange(len(keys), device=keys.device) // group_size >= num_keys
    wide = keys.float()
    # (depth, anchors, groups), filled chunk by chunk: the scores of all anchors at once would not fit.
    best = torch.empty(depth, len(anchors), num_groups, dtype=torch.int32, device=keys.device)
    num_rows = max(1, memory_budget // (12 * len(keys)))  # the scores, and two copies
    for rows in torch.arange(len(anchors), device=anchors.device).split(num_rows):
        bits = products(anchors[rows].float(), wide).view(torch.int32)
        packed = ((bits & -group_size) | member).view(torch.float32)
        packed.masked_fill_(is_missing, -torch.inf)
        if anchor_id is not None and key_id is not None:
            packed.masked_fill_(anchor_id[rows][:, None] == key_id, -torch.inf)
        largest = packed.unflatten(1, (num_groups, group_size)).topk(min(depth, group_size), dim=2).values
        best[:, rows] = _ordered(pad(largest, (0, depth - largest.shape[2]), value=-torch.inf)).movedim(2, 0)
    return best


def unpack(best: Int[Tensor, "*shape"], group_size: int) -> tuple[Float[Tensor, "*shape"], Int[Tensor, "*shape"]]:
    """Return the scores, rounded towards zero by up to ``group_size`` units in the last place of float32, and the places."""
    bits = best ^ ((best >> 31) & 0x7FFFFFFF)
    scores = (bits & -group_size).view(torch.float32)
    return scores.masked_fill(best == NOTHING, -torch.inf), (bits & (group_size - 1)).long()


class Shortlist(NamedTuple):
    """Keys that may be among the most similar to each anchor."""

    index: Int[Tensor, "anchors candidates"]  # type: ignore[assignment]  # a tuple has a method of this name
    scores: Float[Tensor, "anchors candidates"]
    """As they were found, −inf for a place without a candidate."""
    left_out: Float[Tensor, " anchors"]
    """No key that is left out has a higher score. It is −inf where none is left out."""


def grouped_shortlist(best: Int[Tensor, "depth anchors groups"], num: int, group_size: int) -> Shortlist:
    """Choose ``num`` candidates from the best of each group.

    The ``num`` best lie in the ``num`` groups with the highest maxima. A key that is less than the last of its group that is
    known may be hidden behind it.
    """
    depth, num_groups = len(best), best.shape[2]
    num_chosen = min(num, num_groups)
    chosen = best[0].topk(num_chosen, dim=1, sorted=False)
    group = chosen.indices.expand(depth, -1, -1)
    # Only the groups that are chosen are read in full.
    members = best.gather(2, group)  # (depth, anchors, chosen)
    hidden = members[-1].amax(dim=1)
    if num_chosen < num_groups:
        hidden = torch.maximum(hidden, chosen.values.amin(dim=1))
    members, group = (part.transpose(0, 1).flatten(1) for part in (members, group))
    if num < members.shape[1]:
        kept = members.topk(num, dim=1, sorted=False)
        members, group = kept.values, group.gather(1, kept.indices)
        hidden = torch.maximum(hidden, members.amin(dim=1))
    scores, place = unpack(members, group_size)
    # What was rounded may have been more: by the low bits of a positive number. Those of a negative one are turned round.
    left_out = unpack(torch.where(hidden == NOTHING, NOTHING, hidden | (group_size - 1)), 1)[0]
    index = torch.where(scores == -torch.inf, 0, place * num_groups + group)
    index, order = index.sort(dim=1)
    missing = (0, num - index.shape[1])
    return Shortlist(pad(index, missing), pad(scores.gather(1, order), missing, value=-torch.inf), left_out)


def _ordered(scores: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Return integers in the order of the scores: the bits of a float32, the negative ones turned round."""
    bits = scores.contiguous().view(torch.int32)
    return torch.where(scores == -torch.inf, NOTHING, bits ^ ((bits >> 31) & 0x7FFFFFFF))


NOTHING = -(2**31)
"""In place of a key where a group has no further one."""
