"""Upload a folder to the Hugging Face hub."""

import tempfile
from collections.abc import Callable
from typing import Any


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
