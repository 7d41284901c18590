"""Which weights of an open_clip model are frozen."""

from typing import Any

from open_clip.modified_resnet import ModifiedResNet


def check_unlocked_groups(unlocked_groups: int, *, lock_image: bool, lock_text: bool) -> None:
    """Raise a ValueError if the number is negative, or if no tower is locked that groups could be left out of."""
    if not isinstance(unlocked_groups, int) or unlocked_groups < 0:
        raise ValueError(f"Expected `unlocked_groups` to be an integer of at least 0, got {unlocked_groups!r}.")
    if unlocked_groups and not (lock_image or lock_text):
        raise ValueError(
            f"Expected `lock_image=True` or `lock_text=True` with `unlocked_groups={unlocked_groups}`, got neither: all "
            "groups are trained. Lock a tower."
        )


def lock_towers(model: Any, *, lock_image: bool, lock_text: bool, unlocked_groups: int) -> None:
    """Freeze the towers that are locked, and what is never used in training.

    Args:
        model: The open_clip model.
        lock_image: Whether the image tower is frozen. Of a timm model only the trunk is.
        lock_text: Whether the text tower is frozen.
        unlocked_groups: The number of the last groups of a locked tower that stay trainable.

    Raises:
        ValueError: if groups of a ResNet are unlocked, which open_clip can't.
    """
    if lock_image:
        if unlocked_groups and isinstance(model.visual, ModifiedResNet):
            raise ValueError(
                f"Expected `unlocked_groups=0` with the ResNet of open_clip, got {unlocked_groups}: it is locked as a whole. "
                "Use `layer_decay` instead of `lock_image`."
            )
        model.visual.lock(
            unlocked_groups
        )  # its `freeze_bn_stats` drops timm's activations and misses norms: see `train`
    if lock_text:  # a tower of its own, or spread over the model
        model.text.lock(unlocked_groups) if hasattr(model, "text") else model.lock_text_tower(unlocked_groups)
    for name, parameter in model.named_parameters():
        if name.split(".")[0] in {"logit_scale", "logit_bias", "text_decoder"}:  # the last is CoCa's captioner
            parameter.requires_grad_(False)
