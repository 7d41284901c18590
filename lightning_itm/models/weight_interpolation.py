"""A mixture of zero-shot and fine-tuned weights (WiSE-FT)."""

from collections.abc import Mapping

import torch
from torch import Tensor

_LOSS = "loss."


def interpolate_weights(
    zero_shot: Mapping[str, Tensor], fine_tuned: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    r"""Mix the weights of a model before and after fine-tuning.

    .. math:: \theta = (1 - s)\,\theta_{\text{zero-shot}} + s\,\theta_{\text{fine-tuned}}

    Fine-tuning costs accuracy on what the set does not show; somewhere between the two ends there often is a model that has
    most of both. Choose the share on a validation set.

    Batch statistics are mixed as if they were weights; where a model has many of them, compute them anew
    (``torch.optim.swa_utils.update_bn``). Integers, and what a :class:`~lightning_itm.DualEncoder` keeps for its loss
    (``loss.*``: a temperature is of its loss, not of the towers, and the two need not have the same loss), are the fine-tuned.

    Args:
        zero_shot: The ``state_dict()`` before fine-tuning. It must be a copy, ``copy.deepcopy(model.state_dict())``: tensors
            of a ``state_dict`` change with the model.
        fine_tuned: The one after it.
        share: The share of the fine-tuned weights, in [0, 1]; the ends are exact.

    Returns:
        New tensors, of the names, types and devices of ``fine_tuned``; interpolated in float32 or wider.

    Raises:
        ValueError: ``share`` is outside [0, 1]; names or shapes differ.

    Example:
        >>> interpolate_weights({"weight": torch.zeros(2)}, {"weight": torch.ones(2)}, 0.25)
        {'weight': tensor([0.2500, 0.2500])}

    References:
        Wortsman et al., *Robust fine-tuning of zero-shot models*, CVPR 2022, arXiv 2109.01903.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"Expected `share` to be in [0, 1], the share of the fine-tuned weights, got {share}.")
    if odd := sorted(name for name in zero_shot.keys() ^ fine_tuned.keys() if not name.startswith(_LOSS)):
        owner = "fine-tuned" if odd[0] in fine_tuned else "zero-shot"
        raise ValueError(
            f"Expected weights of one model, got {len(odd)} names that only one of the two has, such as {odd[0]!r} (of the "
            f"{owner}). Take both from `state_dict()` of the same module, or both from `checkpoint['state_dict']`."
        )
    mixed = {}
    for name, after in fine_tuned.items():
        is_mixed = after.is_floating_point() and not name.startswith(_LOSS)
        mixed[name] = _mix(name, zero_shot[name], after, share) if is_mixed else after.clone()
    return mixed


def _mix(name: str, before: Tensor, after: Tensor, share: float) -> Tensor:
    if before.shape != after.shape:
        raise ValueError(
            f"Expected weights of one model, got the shapes {tuple(before.shape)} (zero-shot) and {tuple(after.shape)} "
            f"(fine-tuned) for {name!r}. Resize before fine-tuning, and keep a copy of the weights from then."
        )
    width = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    mixed = before.detach().to(after.device, width).lerp(after.detach().to(width), share)
    return mixed.to(after.dtype)
