"""The transforms and the tokenizer that belong to a model."""

import logging
from typing import Any

import open_clip


def open_clip_transforms(
    model_name: str, pretrained: str | None = None, augmentation: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the transforms and the tokenizer of an open_clip model, without its weights.

    Args:
        model_name: A name of ``open_clip.list_models()``, ``hf-hub:...`` or ``local-dir:...``.
        pretrained: The tag of its weights: some were trained with another mean, or another way to resize.
        augmentation: Arguments of ``open_clip.AugmentationCfg``, such as ``{"scale": (0.5, 1)}``.

    Returns:
        ``transform``, ``eval_transform`` and ``tokenizer``, as :class:`~lightning_itm.ImageTextDataset` takes them.
    """
    known = open_clip.get_pretrained_cfg(model_name, pretrained) if pretrained and ":" not in model_name else {}
    preprocessing = {f"image_{name}": known.get(name) for name in ("mean", "std", "interpolation", "resize_mode")}
    logging.disable(logging.WARNING)  # that the model has random weights: nobody will see them
    try:
        _, transform, eval_transform = open_clip.create_model_and_transforms(
            model_name, device="meta", load_weights=False, aug_cfg=augmentation, **preprocessing
        )
    finally:
        logging.disable(logging.NOTSET)
    return {"transform": transform, "eval_transform": eval_transform, "tokenizer": open_clip.get_tokenizer(model_name)}
