"""The model of ``transformers`` itself: its configuration, its weights, and which part of it is which tower."""

import json
from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

from torch import nn

IMAGE_PARTS = ("vision", "visual", "image")
"""The words that the names of an image tower's parts begin with, such as ``vision_model`` and ``visual_projection``."""


def import_transformers() -> Any:
    """Return the module ``transformers``.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "Expected the package `transformers`, which HFDualEncoder reads models with, got none. Install it: "
            'pip install "lightning_itm[hf]".'
        ) from error
    return transformers


def read_config(model_name: str | None, config: Any) -> Any:
    """Return the configuration of a model.

    Args:
        model_name: The model, a name of the hub or a folder. It is read if ``config`` is ``None``.
        config: A configuration of ``transformers``, a dict with ``model_type``, or the path of a JSON file.

    Raises:
        ValueError: if neither of the two is given, or if a dict has no ``model_type``.
    """
    auto = import_transformers().AutoConfig
    if config is None:
        if model_name is None:
            raise ValueError(
                'Expected `model_name`, such as "openai/clip-vit-base-patch32", or `config` to begin with random weights, got '
                "neither. Give one of them."
            )
        return auto.from_pretrained(model_name)
    if isinstance(config, str | PathLike):
        return auto.from_pretrained(fspath(config))
    if isinstance(config, Mapping):
        if "model_type" not in config:
            raise ValueError(
                f"Expected `config` to have a 'model_type', such as 'clip' or 'siglip', got {list(config)}. Add it, or give "
                "an object such as `transformers.CLIPConfig(...)`."
            )
        return auto.for_model(**config)
    return config


def plain(config: Any) -> dict[str, Any]:
    """Return a configuration as a dict of plain values, of which :func:`read_config` makes the same one."""
    return json.loads(config.to_json_string(use_diff=True))  # type: ignore[no-any-return]


def build_model(model_name: str | None, config: Any) -> nn.Module:
    """Return a model in float32.

    Args:
        model_name: Where the weights are read from. ``None``: they are random.
        config: The configuration, an object of ``transformers``.

    Raises:
        ValueError: if the model has no image features or no text features.
    """
    auto = import_transformers().AutoModel
    model: Any = auto.from_config(config) if model_name is None else auto.from_pretrained(model_name, config=config)
    missing = [name for name in ("get_image_features", "get_text_features") if not hasattr(model, name)]
    if missing:
        raise ValueError(
            f"Expected a model with an image tower and a text tower, such as CLIP, SigLIP or SigLIP 2, got "
            f"{type(model).__name__}, which has no {' and no '.join(f'`{name}`' for name in missing)}. Override "
            "`encode_image` and `encode_text` of a DualEncoder for it."
        )
    return model.float()  # type: ignore[no-any-return]  # some weights are stored in half precision, too coarse to train


def compute_activations_twice(model: Any) -> None:
    """Save memory in training: the backward pass computes the activations of each layer again."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    # Some releases make the token embeddings require a gradient, for the reentrant kind. A frozen tower, and the copy of
    # FalseNegativeElimination, must have none.
    if hasattr(model, "_require_grads_hook"):
        model.disable_input_require_grads()


def towers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the image tower, and all the rest but the scale, which is the text tower.

    Both hold the same parameters as the model, with the names that these have in it.
    """
    towers = {"image": nn.Module(), "text": nn.Module()}
    for name, module in model.named_children():
        towers[tower_of(name)].add_module(name, module)
    for name, parameter in model.named_parameters(recurse=False):
        if not name.startswith("logit_"):
            towers[tower_of(name)].register_parameter(name, parameter)
    return towers


def tower_of(name: str) -> str:
    """Return ``"image"`` or ``"text"`` for the name of a part of the model."""
    return "image" if name.startswith(IMAGE_PARTS) else "text"
