"""The folder that ``open_clip.create_model("local-dir:...")`` and ``"hf-hub:..."`` load."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor

from lightning_itm.export.exportable import whole_folder

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"


def describe_model(
    model_name: str, pretrained: str | None = None, model: Any = None, model_cfg: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return all that open_clip must know to build a model again, without its weights, as plain values.

    Args:
        model_name: The name of the model, as ``open_clip.create_model`` takes it.
        pretrained: The tag of its weights. It is looked at without a model only: images were prepared for these weights.
        model: The model itself, which knows how its images are prepared.
        model_cfg: The configuration of the model. Default: what open_clip finds by the name.

    Returns:
        A dict of ``model_name``, ``model_cfg`` and ``preprocess_cfg``.
    """
    if model is None:
        of_tag = open_clip.get_pretrained_cfg(model_name, pretrained) if pretrained else {}
        preprocess = merge_preprocess_dict(asdict(PreprocessCfg()), of_tag)
    else:
        preprocess = model.visual.preprocess_cfg
    config = {
        "model_name": model_name,
        "model_cfg": open_clip.get_model_config(model_name) if model_cfg is None else model_cfg,
        "preprocess_cfg": preprocess,
    }
    return json.loads(json.dumps(config))  # type: ignore[no-any-return]  # a copy of lists, numbers and strings


def create_described_model(config: Mapping[str, Any], augmentation: dict[str, Any] | None = None) -> tuple[Any, ...]:
    """Build a model from what :func:`describe_model` returned. Weights are random: neither a file nor the hub is read.

    Args:
        config: A dict of ``model_name``, ``model_cfg`` and ``preprocess_cfg``.
        augmentation: Options of ``open_clip.AugmentationCfg`` for the training transform.

    Returns:
        The model, its two transforms and its tokenizer. One of Hugging Face is read from where it came from.
    """
    with TemporaryDirectory() as folder, _without_warning_of_no_weights():
        _write_config(Path(folder), config)
        name = f"local-dir:{folder}"
        model, *transforms = open_clip.create_model_and_transforms(name, aug_cfg=augmentation, pretrained_text=False)
        is_hugging_face = bool(config["model_cfg"]["text_cfg"].get("hf_tokenizer_name"))
        tokenizer = open_clip.get_tokenizer(config["model_name"] if is_hugging_face else name)
    return model, *transforms, tokenizer


def save_open_clip(
    folder: str | PathLike[str], weights: Mapping[str, Tensor], config: Mapping[str, Any], tokenizer: Any
) -> None:
    """Write a model of open_clip so that ``open_clip.create_model("local-dir:FOLDER")`` loads it.

    Args:
        folder: A folder that is new or empty.
        weights: The ``state_dict()`` of the model, with the trained ``logit_scale``.
        config: What :func:`describe_model` returned.
        tokenizer: The tokenizer of the model. One of Hugging Face is written to the folder, too.

    Raises:
        FileExistsError: if there is anything in the folder.
        ValueError: if open_clip would load another tokenizer from the folder.
    """
    from safetensors.torch import save_file

    # Not by open_clip's own `save_for_hf`: it stops at its default tokenizer and at weights that share memory, and leaves the
    # size of the images out.
    is_hugging_face = hasattr(tokenizer, "save_pretrained")
    names_one = bool(config["model_cfg"]["text_cfg"].get("hf_tokenizer_name"))
    if is_hugging_face != names_one or not (is_hugging_face or isinstance(tokenizer, open_clip.SimpleTokenizer)):
        raise ValueError(
            f"Expected the tokenizer that open_clip makes for {config['model_name']!r}, got {type(tokenizer).__name__}, which "
            "would not be loaded from the folder. Put that of open_clip.get_tokenizer(...) into `model.transforms`."
        )
    with whole_folder(folder) as part:
        _write_config(part, config)
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
        save_file(tensors, part / WEIGHTS_FILE, metadata={"format": "pt"})
        if is_hugging_face:
            tokenizer.save_pretrained(part)


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    values = {name: config[name] for name in ("model_cfg", "preprocess_cfg")}
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _without_warning_of_no_weights() -> Iterator[None]:
    # open_clip logs to the root logger that the model is random: here the weights of a checkpoint follow.
    def is_other(record: logging.LogRecord) -> bool:
        return "weights" not in record.msg or record.module != "factory"

    root = logging.getLogger()
    root.addFilter(is_other)
    try:
        yield
    finally:
        root.removeFilter(is_other)
