"""An architecture of open_clip from a file of one's own."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from open_clip.pretrained import download_pretrained_from_hf

from lightning_itm.export.open_clip_folder import describe_model

_HUB = "hf-hub:"
KEYS = ("embed_dim", "vision_cfg", "text_cfg")


def read_model_config(model_name: str, described: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Return the configuration in a JSON file, and ``None`` for a name that is no such file.

    Args:
        model_name: The name of a model, or the path of a file that ends with ``.json``.
        described: What a checkpoint keeps of it. The file is not read then.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is no JSON, or lacks a part of a model.
    """
    if not model_name.endswith(".json"):
        return None
    if described is not None:
        return dict(described["model_cfg"])
    path = Path(model_name)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a model configuration at {model_name!r}, found none. Correct the path.")
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"Expected JSON in {model_name!r}, got: {error}. Correct the file.") from error
    missing = [key for key in KEYS if key not in config] if isinstance(config, Mapping) else list(KEYS)
    if missing:
        raise ValueError(
            f"Expected {model_name!r} to have the keys {list(KEYS)}, as open_clip's model_configs, {missing} missing. Of an "
            "`open_clip_config.json`, give its folder: 'local-dir:FOLDER'."
        )
    return dict(config)


def resolve_model_name(model_name: str, config: Mapping[str, Any] | None) -> str:
    """Return the name by which open_clip finds a model.

    Args:
        model_name: The name of a model, or the path of the file that ``config`` was read from.
        config: The configuration, which open_clip is told of. ``None``: open_clip knows the name.

    Raises:
        ValueError: if it doesn't.
    """
    if config is None:
        if ":" not in model_name and model_name not in open_clip.list_models():
            raise ValueError(
                f"Expected `model_name` to be one of open_clip.list_models() or the path of a .json file, or to start with "
                f"'hf-hub:' or 'local-dir:', got {model_name!r}."
            )
        return model_name
    text = json.dumps(config, sort_keys=True)
    # The name depends on the content, so that a file never replaces another one or a model of open_clip.
    name = f"{Path(model_name).stem}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    if name not in open_clip.list_models():
        with tempfile.TemporaryDirectory() as folder:  # open_clip takes a file alone, and keeps what it has read
            path = Path(folder, f"{name}.json")
            path.write_text(text, encoding="utf-8")
            open_clip.add_model_config(path)
    return name


def describe_forced_model(
    name: str, model: Any, forced: Mapping[str, Any], cache_dir: str | None = None
) -> dict[str, Any]:
    """Return how a model is built, as :func:`~lightning_itm.export.open_clip_folder.describe_model`, with forced options.

    Args:
        name: The name by which open_clip finds the model.
        model: The model.
        forced: The options that it was made with, of which some change its configuration.
        cache_dir: The folder that it was downloaded into. Default: the one of the hub.
    """
    known = None
    if name.startswith(_HUB):  # by the name alone, open_clip would look into the hub's own folder
        file = download_pretrained_from_hf(
            name.removeprefix(_HUB), filename="open_clip_config.json", cache_dir=cache_dir
        )
        known = json.loads(Path(file).read_text(encoding="utf-8"))["model_cfg"]
    described = describe_model(name, model=model, model_cfg=known)
    config = described["model_cfg"]
    if forced["force_quick_gelu"]:
        config["quick_gelu"] = True
    if forced["force_image_size"] is not None:
        size = forced["force_image_size"]
        config["vision_cfg"]["image_size"] = size if isinstance(size, int) else list(size)
    if forced["force_context_length"] is not None:
        config["text_cfg"]["context_length"] = forced["force_context_length"]
    return described
