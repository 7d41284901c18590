"""What a module that others can load has: a folder in the format of its library, and a way to the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


class Exportable:
    """Write a trained module for other programs. A subclass implements :meth:`save_pretrained`."""

    library_name = "lightning_itm"
    """The library that loads the folder, as the Hugging Face Hub calls it."""

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the trained model to a folder, in a format that another library loads. Override this.

        Args:
            folder: A folder that is new or empty.
        """
        raise NotImplementedError(
            f"Expected a module with a format of its own, got {type(self).__name__}. Override `save_pretrained` in it, or "
            "write its towers with `lightning_itm.export.export_onnx`."
        )

    def save_for_hub(self, folder: str | PathLike[str], repo_id: str) -> None:
        """Write what :meth:`push_to_hub` uploads: the folder of :meth:`save_pretrained`, and a model card.

        Args:
            folder: A folder that is new or empty.
            repo_id: The repository, such as ``"me/clip-recipes"``.
        """
        self.save_pretrained(folder)
        write_card(folder, self.model_card(repo_id))

    def model_card(self, repo_id: str) -> str:
        """Return the text of the model card. Override it to say what the model was trained on, and its license."""
        name = repo_id.split("/")[-1]
        return f"---\nlibrary_name: {self.library_name}\n---\n\n# {name}\n\nTrained with lightning_itm.\n"

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, **options: Any
    ) -> str:
        """Upload the trained model to the Hugging Face Hub.

        The repository is made where there is none. A model card that it already has is kept.

        Args:
            repo_id: The repository, such as ``"me/clip-recipes"``.
            private: Whether a new repository is private. Default: as your account or organisation has it.
            token: The access token. Default: that of ``hf auth login``.
            **options: Further options of ``huggingface_hub.HfApi.upload_folder``, such as ``commit_message`` and
                ``revision``.

        Returns:
            The address of the commit.

        Raises:
            ValueError: if ``repo_id`` has no owner.
        """
        from huggingface_hub import HfApi

        if repo_id.count("/") != 1:
            raise ValueError(f"Expected `repo_id` to be 'owner/name', got {repo_id!r}.")
        with TemporaryDirectory() as folder:
            self.save_for_hub(
                folder, repo_id
            )  # first, so that a model that can't be written leaves no empty repository
            hub = HfApi(token=token)
            hub.create_repo(repo_id, private=private, exist_ok=True)
            if hub.file_exists(repo_id, "README.md", revision=options.get("revision")):
                (Path(folder) / "README.md").unlink()
            return str(hub.upload_folder(repo_id=repo_id, folder_path=folder, **options))


def write_card(folder: str | PathLike[str], text: str) -> None:
    """Write the model card of a folder, unless there is one."""
    path = Path(folder) / "README.md"
    if not path.exists():
        path.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(folder: str | PathLike[str]) -> Iterator[Path]:
    """Give a folder to write into, and move the files to their place when all are complete.

    So what breaks off, by an error or for want of room, leaves no half model that would pass for a whole one.

    Args:
        folder: Where the files belong. It is made, and must be empty.

    Raises:
        FileExistsError: if there is anything in the folder.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"Expected a new or an empty folder, got {str(folder)!r} with {min(folder.iterdir()).name!r}. Name another one."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".part-", dir=folder) as part:  # on the same disk, where a move copies nothing
        yield Path(part)
        for path in Path(part).iterdir():
            replace(path, folder / path.name)
