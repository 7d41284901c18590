"""Read image-text data in the form that people have it: one function, and a datamodule that needs only paths."""

import itertools
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from lightning_itm.data.datamodule import ImageTextDataModule
from lightning_itm.data.image import open_clip_transforms
from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.data.readers import read_json
from lightning_itm.data.readers.huggingface import load_saved
from lightning_itm.data.shards.dataset import ShardDataset
from lightning_itm.data.shards.index import ShardIndex
from lightning_itm.data.shards.paths import Source, is_shards
from lightning_itm.data.shards.stream import ShardStream


def read_pairs(
    source: Source,
    image_root: str | PathLike[str] | None = None,
    *,
    split: str = "train",
    image_column: str = "image",
    text_column: str = "text",
    delimiter: str | None = None,
    encoding: str | None = None,
    index: str | PathLike[str] | None = None,
    hard_captions: str | None = None,
    **kwargs: Any,
) -> ImageTextDataset:
    """Read image-text pairs from files. The form is told by the name.

    In every form, an image has one caption or several: the rows of a table with the same image, the lines of a ``.txt``, a
    list of strings in a JSON. What is no text there, such as NaN, a number, an object or an empty cell, is left out. One
    warning says how many of them there are, and where the first is.

    Args:
        source: A ``.json`` (Karpathy's, COCO's ``captions_*.json``, or a list of objects as BLIP has), a table (``.csv``,
            ``.tsv``, ``.jsonl``), a folder of images with ``.txt`` files beside them, a folder that ``save_to_disk`` of a
            Hugging Face data set made, or tar shards: a folder of ``.tar`` files, a pattern such as
            ``"train/{00000..00031}.tar"``, or a list.
        image_root: The folder that image paths in a JSON file or a table start from. Default: the folder of that file.
        split: The split of a Karpathy JSON, or of a saved data set, to read: ``"train"``, ``"val"`` or ``"test"``.
        image_column: The column of a table that holds the image paths. Change it if yours has another name.
        text_column: The column of a table that holds the texts. Change it if yours has another name.
        delimiter: The sign between columns. Default: the comma, tab, ``|`` or semicolon by which the header has both columns.
        encoding: The encoding of text files, such as ``"cp1252"``. Default: UTF-8, or UTF-16 if a file begins with its mark.
        index: The file that says what is in the shards. Default: beside the first shard. Remote shards need one.
        hard_captions: The column of a table, or of a list of objects, with captions that are wrong for the image of their row.
            :meth:`~lightning_itm.ImageTextDataset.from_csv` has the forms. In shards it is ``"hard_captions"``. Default: none.
        **kwargs: The options of :class:`~lightning_itm.ImageTextDataset`, such as ``transform`` and ``tokenizer``.

    Raises:
        ValueError: if ``source`` has none of these forms, is in another encoding, or what it holds does not fit together.
        FileNotFoundError: if ``source`` or its first image does not exist.
    """
    hard: dict[str, Any] = {} if hard_captions is None else {"hard_captions": hard_captions}
    # A list can only be shards. Other forms are one file or one folder.
    if is_shards(source) or not isinstance(source, str | PathLike):
        if hard_captions not in (None, "hard_captions"):
            raise ValueError(f"Expected 'hard_captions', their name in shards, got {hard_captions!r} of {source}.")
        return ShardDataset(source, index=index, hard_captions=hard_captions is not None, **kwargs)
    path, ending = Path(source), Path(source).suffix.lower()
    if not (ending or path.exists()):
        raise FileNotFoundError(f"Expected {source}, found none.")
    if path.is_dir():
        if (saved := load_saved(path, split)) is not None:
            names: Any = {"image": image_column, "captions": text_column, "image_root": image_root or ".", **hard}
            return ImageTextDataset.from_huggingface(saved, **names, **kwargs)
        if hard:
            raise ValueError(f"Expected a table or a list of objects with {hard_captions!r}, got the folder {source}.")
        return ImageTextDataset.from_folder(path, encoding=encoding, **kwargs)
    if ending not in (".json", ".jsonl", ".csv", ".tsv"):
        raise ValueError(f"Expected a .json, .jsonl, .csv, .tsv or .tar file, a pattern or a folder, got {source}.")
    if not path.is_file():
        raise FileNotFoundError(f"Expected {source}, found none.")
    root = path.parent if image_root is None else image_root
    columns: dict[str, Any] = {"image_column": image_column, "text_column": text_column, "encoding": encoding}
    if ending == ".json":
        images, texts, wrong = read_json(path, root, split, **columns, **hard)
        return ImageTextDataset(images, texts, hard_captions=wrong, **kwargs)
    if ending == ".jsonl":
        return ImageTextDataset.from_jsonl(path, root, **columns, **hard, **kwargs)
    return ImageTextDataset.from_csv(path, root, delimiter=delimiter, **columns, **hard, **kwargs)


class ImageTextFilesDataModule(ImageTextDataModule):
    """Make batches of image-text pairs from files, in Python or on the command line.

    Args:
        train: The training set: a file, a folder or shards, in a form that :func:`read_pairs` knows. From a Karpathy JSON each
            of the three arguments reads the split of its name, and ``train`` reads ``restval``, too.
        val: The validation set, in any of the same forms. Without it, nothing is validated.
        test: The test set, in any of the same forms.
        image_root: The folder that image paths in a JSON file or a table start from. Default: the folder of that file.
        image_column: The column of a table that holds the image paths. Change it if yours has another name.
        text_column: The column of a table that holds the texts. Change it if yours has another name.
        equal_captions: ``"exclude"`` or ``"keep"`` captions of several images, as :class:`~lightning_itm.ImageTextDataset`.
        delimiter: The sign between columns. Default: the comma, tab, ``|`` or semicolon by which the header has both columns.
        encoding: The encoding of text files, such as ``"cp1252"``. Default: UTF-8, or UTF-16 if a file begins with its mark.
        stream: Read ``train`` from front to back (:class:`~lightning_itm.ShardStream`), from the web or from a slow disk.
        shuffle_buffer: The number of pairs among which a worker of the stream draws the next one. More shuffles better and
            takes more memory.
        resampled: Let the stream draw shards with replacement. For sets too large to be read in whole.
        pairs_per_epoch: The number of pairs in an epoch of a stream that is resampled. Default: as many as there are.
        index: The file that says what is in the shards of ``train``, or a dict such as ``{"train": ..., "val": ...}``. Shards
            that are remote, or in a folder that can't be written, need one.
        hard_captions: The column of wrong captions in ``train``, as :func:`read_pairs` takes it. Default: there are none.
        num_hard_captions: How many of them are drawn per pair and epoch.
        model_name: The open_clip model whose transforms and tokenizer are used, such as ``"ViT-B-32"``. Default: those of the
            module that is trained (``module.transforms``).
        pretrained: The tag of its weights, if ``model_name`` is given. Some weights need other transforms.
        augmentation: Arguments of ``open_clip.AugmentationCfg`` for the training images, if ``model_name`` is given. Such as
            ``{"scale": (0.5, 1)}``.
        max_unreadable: The fraction of pairs that may be unreadable in training. Raise it for a set from the web of which more
            is lost.
        batch_size: Number of pairs per batch on each rank. More pairs are more negatives.
        eval_batch_size: Number of pairs per batch in evaluation, which needs less memory. Default: ``batch_size``.
        num_workers: Number of processes per loader. Default: the usable cores, at most 8.
        persistent_workers: Keep the workers from one epoch to the next. Turn it off to save memory.
        drop_last: Leave out the training pairs that do not fill a batch. In each epoch it is other pairs.
        seed: The seed of order and augmentation. Another one gives another run.

    Raises:
        MisconfigurationException: if the Trainer asks for a set that was not given, if there are no transforms, or if
            ``stream`` is set and ``train`` is no shards.
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
        equal_captions: Literal["exclude", "keep"] = "exclude",
        delimiter: str | None = None,
        encoding: str | None = None,
        stream: bool = False,
        shuffle_buffer: int = 4096,
        resampled: bool = False,
        pairs_per_epoch: int | None = None,
        index: str | dict[str, str] | None = None,
        hard_captions: str | None = None,
        num_hard_captions: int = 1,
        model_name: str | None = None,
        pretrained: str | None = None,
        augmentation: dict[str, Any] | None = None,
        max_unreadable: float = 0.05,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        persistent_workers: bool = True,
        drop_last: bool = True,
        seed: int = 0,
    ) -> None:
        sizes: dict[str, Any] = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "drop_last": drop_last}
        workers: dict[str, Any] = {"num_workers": num_workers, "persistent_workers": persistent_workers}
        super().__init__(**sizes, **workers, seed=seed)
        self.sources: dict[str, Any] = {"train": train, "val": val, "test": test}
        self._warn_of_one_source_twice(lambda source: not str(source).endswith(".json"))
        columns = {"image_column": image_column, "text_column": text_column, "delimiter": delimiter}
        files = {"image_root": image_root, "encoding": encoding, "max_unreadable": max_unreadable}
        self.options: dict[str, Any] = {**files, **columns, "equal_captions": equal_captions}
        hard: dict[str, Any] = {"hard_captions": hard_captions, "num_hard_captions": num_hard_captions}
        self.train_options = {} if hard_captions is None else hard
        self.stream, self.index = stream, index if isinstance(index, dict) else {"train": index}
        shuffling = {"shuffle_buffer": shuffle_buffer, "resampled": resampled}
        self.stream_options: dict[str, Any] = {**shuffling, "pairs_per_epoch": pairs_per_epoch}
        self.model_name, self.pretrained, self.augmentation = model_name, pretrained, augmentation
        self._own_transforms: dict[str, Any] | None = None  # made at the first use, since that takes a second
        self._read_with: dict[str, Any] = {}

    def _warn_of_one_source_twice(self, has_no_splits: Callable[[Any], bool]) -> None:
        for one, other in itertools.combinations(self.sources, 2):
            source = self.sources[one]
            # Most likely a slip, after which the result on `val` would be that of the training set.
            if source is not None and source == self.sources[other] and has_no_splits(source):
                what = f"`{one}` and `{other}` are the same, {source}, which has no splits as a Karpathy .json has"
                rank_zero_warn(f"{what}: both will be all of it.")

    def prepare_data(self) -> None:
        """Index the shards."""
        # In this hook, which one process per machine runs while the others wait: all of them then map the same file.
        for split, source in self.sources.items():
            if source is not None and is_shards(source):
                ShardIndex.open(
                    source, self.index.get(split), hard_captions=split == "train" and self.train_options != {}
                )

    def setup(self, stage: str) -> None:
        """Read the sets that a stage needs, unless they were read before, with these transforms."""
        # In this hook and not in the constructor: only here the module is known, whose transforms may be the ones to use.
        super().setup(stage)
        splits = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"]}
        needed = splits.get(stage, [self.predict_split])
        if self.sources[needed[0]] is None:  # a fit needs `train`, and can do without `val`
            what = f"Expected `{needed[0]}`, a file, a folder or shards to read, for the stage {stage!r}"
            raise MisconfigurationException(f"{what}, got None.")
        for split in needed:
            # `fit` and then `test` share what was read. Another module has other transforms, and reads anew.
            if self.sources[split] is not None and self._read_with.get(split) is not self.transforms:
                setattr(self, f"{split}_dataset", self._read(split))
                self._read_with[split] = self.transforms
        if stage == "fit":
            self._check_train_dataset()
            read = [getattr(pairs, "images", None) for pairs in (self.train_dataset, self.val_dataset)]
            # Of JSON files, only Karpathy's have splits.
            self._warn_of_one_source_twice(lambda source: str(source).endswith(".json") and read[0] == read[1])

    @property
    def transforms(self) -> dict[str, Any]:
        """Return transforms and tokenizer: those of ``model_name``, or else of the module that is trained.

        Raises:
            MisconfigurationException: if ``model_name`` was not given, and the module has no dict ``transforms``.
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
        options = {**self.options, **self.transforms, **(self.train_options if split == "train" else {})}
        pairs = read_pairs(self.sources[split], split=split, index=self.index.get(split), **options)
        if not self.stream or split != "train":
            return pairs  # in evaluation each id is wanted once, in order, which a stream can't promise
        if not isinstance(pairs, ShardDataset):
            raise MisconfigurationException(
                f"Expected `train` to be .tar shards with `stream=True`, got {self.sources[split]}. Write it into shards "
                "first: `lightning-itm shards write`."
            )
        return ShardStream(pairs, **self.stream_options)
