"""A mixture of zero-shot and fine-tuned weights (WiSE-FT)."""

from collections.abc import Mapping

import torch
from torch import Tensor

_LOSS = "loss."
# An adapter of LoRA is a product of two matrices, and the second is zero at the start. Its fraction is that of the second.
_ADAPTER_IN, _ADAPTER_OUT = ".lora_A.", ".lora_B."


def interpolate_weights(
    zero_shot: Mapping[str, Tensor], fine_tuned: Mapping[str, Tensor], fraction: float
) -> dict[str, Tensor]:
    r"""Mix the weights of a model before and after fine-tuning.

    .. math:: \theta = (1 - s)\,\theta_{\text{zero-shot}} + s\,\theta_{\text{fine-tuned}}

    Fine-tuning makes a model better on its training set and often worse on everything else. A mixture of both often keeps
    most of the old and most of the new. Try fractions such as 0.25, 0.5 and 0.75, and choose on a validation set.

    Batch statistics are mixed like weights. If a model has many of them, compute them anew with
    ``torch.optim.swa_utils.update_bn``. Two kinds of entries are taken from ``fine_tuned`` as they are: integers, and the
    entries of a :class:`~lightning_itm.DualEncoder`'s loss (``loss.*``), because the two models may have different losses.

    Of a model with LoRA adapters, the fraction is that of what the adapters add to the weights.

    Args:
        zero_shot: The ``state_dict()`` before fine-tuning. Make a copy with ``copy.deepcopy(model.state_dict())``, because the
            tensors of a ``state_dict`` change with the model.
        fine_tuned: The ``state_dict()`` after fine-tuning, of the same model.
        fraction: The fraction s of the fine-tuned weights, in [0, 1]. At 0 and 1 the result is exactly one of the two.

    Returns:
        New tensors with the names, types and devices of ``fine_tuned``. They are computed in float32 or wider.

    Raises:
        ValueError: if ``fraction`` is outside [0, 1], if names or shapes differ, or if adapters of the zero-shot model do
            something already.

    Example:
        >>> import torch
        >>> from lightning_itm import interpolate_weights
        >>> interpolate_weights({"weight": torch.zeros(2)}, {"weight": torch.ones(2)}, 0.25)
        {'weight': tensor([0.2500, 0.2500])}

    References:
        Wortsman et al., *Robust fine-tuning of zero-shot models*, CVPR 2022, arXiv 2109.01903.
    """
    if not 0 <= fraction <= 1:  # false for NaN, too
        raise ValueError(f"Expected `fraction` to be in [0, 1], that of the fine-tuned weights, got {fraction}.")
    # Names that only one of the two has. Those of the loss may differ.
    if odd := sorted(name for name in zero_shot.keys() ^ fine_tuned.keys() if not name.startswith(_LOSS)):
        owner = "fine-tuned" if odd[0] in fine_tuned else "zero-shot"
        raise ValueError(
            f"Expected weights of one model, got {len(odd)} names that only one of the two has, such as {odd[0]!r} (of the "
            f"{owner}). Take both from `state_dict()` of the same module, or both from `checkpoint['state_dict']`."
        )
    mixed = {}
    for name, after in fine_tuned.items():
        is_mixed = after.is_floating_point() and not name.startswith(_LOSS) and _ADAPTER_IN not in name
        if _ADAPTER_OUT in name and bool(zero_shot[name].any()):
            raise ValueError(
                f"Expected the zero-shot weights to have adapters that do nothing yet, got {name!r} with other values than 0. "
                "Interpolate the merged weights, `model.merged().state_dict()` of both."
            )
        mixed[name] = _mix(name, zero_shot[name], after, fraction) if is_mixed else after.clone()
    return mixed


def _mix(name: str, before: Tensor, after: Tensor, fraction: float) -> Tensor:
    if before.shape != after.shape:
        raise ValueError(
            f"Expected weights of one model, got the shapes {tuple(before.shape)} (zero-shot) and {tuple(after.shape)} "
            f"(fine-tuned) for {name!r}. Resize before fine-tuning, and keep a copy of the weights from then."
        )
    # In half precision the difference of two weights may overflow, or round to nothing.
    width = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    mixed = before.detach().to(after.device, width).lerp(after.detach().to(width), fraction)
    return mixed.to(after.dtype)
