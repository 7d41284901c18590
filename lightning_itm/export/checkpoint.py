"""Load the module of a checkpoint by the checkpoint alone."""

import pickle
import sys
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

import torch


def load_module(ckpt_path: str | PathLike[str], class_path: str | None = None, *, weights_only: bool = True) -> Any:
    """Load the module of a Lightning checkpoint, without the weights and the files that its training began with.

    A run with Lightning's ``WeightAveraging`` gives the averaged weights, because they are the ``state_dict`` of its
    checkpoints.

    Args:
        ckpt_path: The checkpoint, a file.
        class_path: The class of the module, such as ``"own.Own"``. Default: the class that the checkpoint names, or that the
            ``config.yaml`` of the command line names beside it or in the folder above. It must be one of lightning_itm, or in
            a module that is imported already.
        weights_only: Load tensors and plain numbers only. Turn it off only for a file that you trust.

    Returns:
        The module on the CPU, in eval mode.

    Raises:
        ValueError: if it is no file of a whole Lightning checkpoint, or if its class is not known or not found.
    """
    path = Path(ckpt_path)
    if path.is_dir():
        raise ValueError(
            f"Expected `ckpt_path` to be a file, got the folder {str(path)!r}: weights in shards. Write whole ones, such as "
            "with FSDPStrategy(state_dict_type='full'), or join them with lightning.pytorch.utilities.consolidate_checkpoint."
        )
    try:
        # Mapped, because this reads the hyperparameters alone.
        saved = torch.load(str(path), map_location="cpu", weights_only=weights_only, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"Expected a checkpoint of tensors and plain numbers, got {str(path)!r} with other objects. If you trust the "
            "file, load it with `weights_only=False` (--weights_only false)."
        ) from error
    if not isinstance(saved, dict) or "state_dict" not in saved:
        raise ValueError(f"Expected a checkpoint of Lightning's Trainer, got {str(path)!r} without a 'state_dict'.")
    kind = _find_class(class_path or _named_class(saved, path), path)
    options: dict[str, Any] = {}
    if hasattr(kind, "options_for_export"):
        options = kind.options_for_export(saved.get("hyper_parameters", {}))
    del saved
    return kind.load_from_checkpoint(path, map_location="cpu", weights_only=weights_only, **options).eval()


def _named_class(saved: dict[str, Any], path: Path) -> str | None:
    name = saved.get("class_path") or _class_of_config(path)
    room = str(name).rpartition(".")[0]
    if name is None or room == "__main__" or room in sys.modules or room.split(".")[0] == "lightning_itm":
        return name
    # An import runs code: a file that is not trusted must not choose it.
    raise ValueError(
        f"Expected a class of lightning_itm, got {name!r}, which {str(path)!r} names. If you trust it, name it yourself: "
        f"`--model {name}`."
    )


def _class_of_config(path: Path) -> str | None:
    """Return the class in the configuration that the command line wrote: Lightning puts checkpoints one folder below it."""
    import yaml  # type: ignore[import-untyped]

    for folder in (path.absolute().parent, path.absolute().parent.parent):
        if (folder / "config.yaml").is_file():
            model = (yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}).get("model")
            return model.get("class_path") if isinstance(model, dict) else None
    return None


def _find_class(name: str | None, path: Path) -> Any:
    way_out = "Name it, as in `--model lightning_itm.OpenCLIPDualEncoder` or `--model own.Own` for a class in own.py."
    if name is None:
        raise ValueError(f"Expected a checkpoint that names the class of its module, got {str(path)!r}. {way_out}")
    module, _, attribute = name.rpartition(".")
    if module in ("", "__main__") or "<locals>" in name:  # of a script, or inside a function: not found by name
        raise ValueError(f"Expected a class that can be imported, got {name!r}. {way_out}")
    try:
        kind = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"Expected a class that can be imported, got {name!r}: {error}. {way_out}") from error
    if not (isinstance(kind, type) and hasattr(kind, "load_from_checkpoint") and hasattr(kind, "encode_image")):
        raise ValueError(f"Expected a subclass of lightning_itm.DualEncoder, got {name!r}. {way_out}")
    return kind
