"""Image-text data in the form that people have it: one function to read it, and a datamodule that needs only paths."""

import itertools
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from lightning_itm.data.datamodule import ImageTextDataModule
from lightning_itm.data.image import open_clip_transforms
from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.data.shards.dataset import ShardDataset
from lightning_itm.data.shards.index import ShardIndex
from lightning_itm.data.shards.paths import is_remote
from lightning_itm.data.shards.stream import ShardStream

Source = str | PathLike[str] | Sequence[str | PathLike[str]]


def read_pairs(
    source: Source,
    image_root: str | PathLike[str] | None = None,
    *,
    split: str = "train",
    image_column: str = "image",
    text_column: str = "text",
    index: str | PathLike[str] | None = None,
    **kwargs: Any,
) -> ImageTextDataset:
    """Read image-text pairs, whatever their form.

    Args:
        source: A Karpathy ``.json``; a ``.csv``, ``.tsv`` or ``.jsonl``; a folder of images with ``.txt`` files beside them; a
            folder of ``.tar`` shards, a pattern of them or a list.
        image_root: The folder that image paths start from; default: where the file is.
        split: Of a Karpathy JSON.
        image_column: Of a table.
        text_column: Of a table.
        index: See :class:`~lightning_itm.ShardDataset`.
        **kwargs: ``transform``, ``eval_transform`` and ``tokenizer``.

    Raises:
        ValueError: A source of none of these forms.
        FileNotFoundError: It is not there.
    """
    if is_shards(source) or not isinstance(source, str | PathLike):
        return ShardDataset(source, index=index, **kwargs)
    path, ending = Path(source), Path(source).suffix.lower()
    if not ending and not path.exists():
        raise FileNotFoundError(f"Expected {source}, found none.")
    if path.is_dir():
        return ImageTextDataset.from_folder(path, **kwargs)
    if ending not in (".json", ".jsonl", ".csv", ".tsv"):
        raise ValueError(
            f"Expected a .json (Karpathy), .jsonl, .csv, .tsv or .tar file, a pattern of .tar files or a folder, got {source}."
        )
    if not path.is_file():
        raise FileNotFoundError(f"Expected {source}, found none.")
    root = path.parent if image_root is None else image_root
    if ending == ".json":
        return ImageTextDataset.from_karpathy(path, root, split, **kwargs)
    columns = {"image_column": image_column, "text_column": text_column}
    if ending == ".jsonl":
        return ImageTextDataset.from_jsonl(path, root, **columns, **kwargs)
    return ImageTextDataset.from_csv(path, root, delimiter="," if ending == ".csv" else "\t", **columns, **kwargs)


def is_shards(source: Source) -> bool:
    """Return whether a source is tar shards: a folder of them, a pattern, an address or a list."""
    if not isinstance(source, str | PathLike):
        return True
    path = Path(source)
    return path.suffix.lower() == ".tar" or is_remote(fspath(source)) or (path.is_dir() and any(path.glob("*.tar")))


class ImageTextFilesDataModule(ImageTextDataModule):
    """Batches of image-text pairs from files: what :func:`read_pairs` reads, for Python and for the command line.

    Args:
        train: What is trained on: a file, a folder or shards; see :func:`read_pairs`. The splits of a Karpathy JSON are taken
            by the name of the argument: ``train`` (with ``restval``), ``val``, ``test``.
        val: What is validated on, likewise.
        test: What is tested on, likewise.
        image_root: The folder that image paths start from; default: where the file is.
        image_column: The column of images in a table.
        text_column: The column of texts in a table.
        stream: Read ``train``, which must be shards, from front to back (:class:`~lightning_itm.ShardStream`).
        shuffle_buffer: Of the stream.
        resampled: Of the stream.
        pairs_per_epoch: Of the stream, if it is resampled.
        index: The file that says what is in the shards of ``train``, or ``{"train": ..., "val": ...}``; remote shards, and
            those in a folder that can't be written, need one.
        model_name: The open_clip model whose transforms and tokenizer are used; default: those of the module that is trained
            (``module.transforms``).
        pretrained: The tag of its weights, if ``model_name`` is given.
        augmentation: Of the training images, if ``model_name`` is given: arguments of ``open_clip.AugmentationCfg``.
        batch_size: As for :class:`ImageTextDataModule`, also the rest.
        eval_batch_size: See there.
        num_workers: See there.
        persistent_workers: See there.
        drop_last: See there.
        seed: See there.

    Raises:
        MisconfigurationException: No source for what the Trainer asks for, no transforms, or a stream of what are no shards.
    """

    earlier_names = ("ImageTextFiles",)

    def __init__(
        self,
        train: str | list[str] | None = None,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        *,
        image_root: str | None = None,
        image_column: str = "image",
        text_column: str = "text",
        stream: bool = False,
        shuffle_buffer: int = 4096,
        resampled: bool = False,
        pairs_per_epoch: int | None = None,
        index: str | dict[str, str] | None = None,
        model_name: str | None = None,
        pretrained: str | None = None,
        augmentation: dict[str, Any] | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        persistent_workers: bool = True,
        drop_last: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            persistent_workers=persistent_workers,
            drop_last=drop_last,
            seed=seed,
        )
        self.sources: dict[str, Any] = {"train": train, "val": val, "test": test}
        for one, other in itertools.combinations(self.sources, 2):
            source = self.sources[one]
            if source is not None and source == self.sources[other] and not str(source).endswith(".json"):
                rank_zero_warn(
                    f"`{one}` and `{other}` are the same, {source}, which has no splits as a Karpathy .json has: both will be "
                    "all of it."
                )
        self.options: dict[str, Any] = {
            "image_root": image_root,
            "image_column": image_column,
            "text_column": text_column,
        }
        self.stream, self.index = stream, index if isinstance(index, dict) else {"train": index}
        self.stream_options: dict[str, Any] = {
            "shuffle_buffer": shuffle_buffer,
            "resampled": resampled,
            "pairs_per_epoch": pairs_per_epoch,
        }
        self.model_name, self.pretrained, self.augmentation = model_name, pretrained, augmentation
        self._own_transforms: dict[str, Any] | None = None
        self._read_with: dict[str, Any] = {}

    def prepare_data(self) -> None:
        """Find out what is in the shards, in one process."""
        for split, source in self.sources.items():
            if source is not None and is_shards(source):
                ShardIndex.open(source, self.index.get(split))

    def setup(self, stage: str) -> None:
        """Read the sets that a stage needs, unless they were read before, with these transforms."""
        super().setup(stage)
        needed: list[str] = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"]}.get(
            stage, [self.predict_split]
        )
        if self.sources[needed[0]] is None:
            raise MisconfigurationException(
                f"Expected `{needed[0]}`, a file, a folder or shards to read, for the stage {stage!r}, got None."
            )
        for split in needed:
            if self.sources[split] is not None and self._read_with.get(split) is not self.transforms:
                setattr(self, f"{split}_dataset", self._read(split))
                self._read_with[split] = self.transforms

    @property
    def transforms(self) -> dict[str, Any]:
        """Transforms and tokenizer: those of ``model_name``, or else of the module that is trained.

        Raises:
            MisconfigurationException: There are none.
        """
        if self.model_name is not None:
            if self._own_transforms is None:
                self._own_transforms = open_clip_transforms(self.model_name, self.pretrained, self.augmentation)
            return self._own_transforms
        module = None if self.trainer is None else self.trainer.lightning_module
        transforms: Any = getattr(module, "transforms", None)
        if not isinstance(transforms, dict):
            raise MisconfigurationException(
                "Expected `model_name`, the open_clip model whose transforms and tokenizer are used, or a module with a dict "
                f"`transforms`, got {self.model_name} and {type(module).__name__}."
            )
        return transforms

    def _read(self, split: str) -> ImageTextDataset | ShardStream:
        index = self.index.get(split)
        pairs = read_pairs(self.sources[split], split=split, index=index, **self.options, **self.transforms)
        if not self.stream or split != "train":
            return pairs
        if not isinstance(pairs, ShardDataset):
            raise MisconfigurationException(
                f"Expected `train` to be .tar shards with `stream=True`, got {self.sources[split]}. Write it into shards "
                "first: `lightning-itm shards write`."
            )
        return ShardStream(pairs, **self.stream_options)
