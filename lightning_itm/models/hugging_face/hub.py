"""Write a model in the format of Hugging Face, and upload it."""

import tempfile
from collections.abc import Callable
from os import PathLike, fspath
from typing import Any

from torch import nn

from lightning_itm.models.pretrained.scale import scale_of_loss


def save_model(model: Any, loss: nn.Module, folder: str | PathLike[str]) -> None:
    """Write configuration and weights, with the temperature and the bias that the loss has learned.

    Args:
        model: The model of ``transformers``. It is not changed.
        loss: The loss, which may have ``logit_scale`` and ``logit_bias``.
        folder: The folder.
    """
    # The loss keeps its logarithm in range at each step's costs, and the last step may have led out of it.
    if hasattr(loss, "scale"):
        loss.scale()
    weights = {name: value.detach() for name, value in model.state_dict().items()} | scale_of_loss(loss, model)
    model.save_pretrained(fspath(folder), state_dict=weights)


def push_folder(write: Callable[[str], object], repo_id: str, **kwargs: Any) -> str:
    """Write into a folder, and upload it to the Hugging Face hub.

    Args:
        write: Writes the files into the folder that it is given.
        repo_id: The name of the repository.
        **kwargs: ``private`` and ``token`` of ``create_repo``, and options of ``upload_folder``.

    Returns:
        The address of the repository.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=kwargs.pop("token", None))
    address = api.create_repo(repo_id, private=kwargs.pop("private", None), exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, **kwargs)
    return str(address)
