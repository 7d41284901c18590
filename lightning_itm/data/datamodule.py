"""A datamodule that knows where it is, so that a run can stop anywhere and go on."""

import os
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Dataset

from lightning_itm.data.batch import collate_pairs
from lightning_itm.data.composed.joins import check_ids
from lightning_itm.data.evaluation_items import KINDS, EvaluationItems, evaluation_view
from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.data.position import Position
from lightning_itm.data.resumable_loader import EpochOrder, EpochSampler, OrderedDataset, ResumableLoader, SeededDataset
from lightning_itm.data.shards.loader import StreamedBatches, StreamLoader
from lightning_itm.data.shards.stream import ShardStream
from lightning_itm.identity import identity_of
from lightning_itm.shared_integers import SharedIntegers


class ImageTextDataModule(L.LightningDataModule):
    """Make batches of image-text pairs for training and evaluation, in a run that can be resumed at any batch.

    A run may stop at the end of an epoch, in its middle or by ``kill -9``. Resumed with ``ckpt_path``, it sees the batches
    that the uninterrupted run would have seen. For that, order and augmentation are functions of (seed, epoch, pair), and the
    checkpoint says where the run was.

    Args:
        train_dataset: The training set, a dataset with random access or a :class:`~lightning_itm.ShardStream`. A callback may
            wrap it in its ``setup``.
        val_dataset: The validation set. Without it, nothing is validated. An :class:`~lightning_itm.ImageTextDataset`, or a
            ``Subset`` of one, is read through its ``evaluation()``.
        test_dataset: The test set. It is read like the validation set.
        batch_size: Number of pairs per batch on each rank. More pairs are more negatives.
        eval_batch_size: Number of pairs per batch in evaluation, which needs less memory. Default: ``batch_size``.
        num_workers: Number of processes per loader. Default: the usable cores, at most 8.
        persistent_workers: Keep the workers from one epoch to the next. Turn it off to save memory.
        drop_last: Leave out the training pairs that do not fill a batch. In each epoch it is other pairs.
        seed: The seed of order and augmentation. Another one gives another run.

    Attributes:
        predict_split: The set that ``Trainer.predict`` reads: ``"train"``, ``"val"`` or ``"test"``.
        train_order: The order of each epoch's training pairs, where a callback composes it in its ``setup``. None: a random
            order.
        awaited: What a callback publishes before the first batch is loaded, such as its table of negatives. None: nothing.

    Raises:
        ValueError: if ``batch_size`` or ``eval_batch_size`` is not positive.
        MisconfigurationException: if a set that the Trainer asks for was not given, or if it is too small for one batch.

    Example:
        >>> from PIL import Image
        >>> from lightning_itm import ImageTextDataModule, ImageTextDataset
        >>> pairs = ImageTextDataset([Image.new("RGB", (8, 8), name) for name in ("red", "blue")], ["red", "blue"])
        >>> data = ImageTextDataModule(pairs, pairs, batch_size=2, num_workers=0)
        >>> next(iter(data.val_dataloader()))["text"]
        ['red', 'blue']
    """

    earlier_names: tuple[str, ...] = ()
    """Names that the class had, under which older checkpoints keep its state."""

    def __init__(
        self,
        train_dataset: Dataset[Any] | ShardStream | None = None,
        val_dataset: Dataset[Any] | ShardStream | None = None,
        test_dataset: Dataset[Any] | ShardStream | None = None,
        *,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        persistent_workers: bool = True,
        drop_last: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if size is not None and size < 1:
                raise ValueError(f"Expected `{name}` to be a positive integer, got {size}.")
        self.train_dataset, self.val_dataset, self.test_dataset = train_dataset, val_dataset, test_dataset
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.num_workers = _default_num_workers() if num_workers is None else num_workers
        self.persistent_workers = persistent_workers
        self.drop_last = drop_last
        self.seed = seed
        self.predict_split: Literal["train", "val", "test"] = "test"
        self.train_order: EpochOrder | None = None
        self.awaited: SharedIntegers | None = None
        self._was_composed = False
        self._fit_trainer: L.Trainer | None = None
        self._position = Position()

    def setup(self, stage: str) -> None:
        """Forget where an earlier run was resumed, and the order that its callbacks composed. Check the training set."""
        check_ids(train_dataset=self.train_dataset, val_dataset=self.val_dataset, test_dataset=self.test_dataset)
        if stage != "fit":
            return  # perhaps of another Trainer, that validates within a fit
        # In this hook, which runs before `load_state_dict`: a checkpoint of this run is not forgotten. It runs before the
        # `setup` of callbacks, too, and after a fit that ended with an error.
        self._position.forget()
        self.train_order, self.awaited, self._was_composed = None, None, False
        # Each Trainer that gets this object writes itself into `self.trainer`. The position is that of the one that fits.
        self._fit_trainer = self.trainer
        self._check_train_dataset()

    def train_dataloader(self) -> DataLoader[Any] | StreamLoader:
        """Return the loader of this rank's part of each epoch. Without a Trainer, it is a plain one."""
        dataset, trainer = _given(self.train_dataset, "train_dataset"), self._training()
        self._check_one_batch(dataset)
        if isinstance(dataset, ShardStream):
            return self._stream_loader(dataset, trainer)
        if trainer is None:
            return DataLoader(
                dataset, self.batch_size, shuffle=True, drop_last=self.drop_last, **self._loader_options()
            )
        seeded = SeededDataset(dataset, self.seed)
        # A DistributedSampler of our own: Lightning would wrap another sampler into one that begins each epoch at its start.
        sampler = EpochSampler(
            seeded,
            self.batch_size,
            self._next_batch,
            shuffle=self.train_order is None,
            num_replicas=trainer.world_size,
            rank=trainer.global_rank,
            seed=self.seed,
        )
        # A checkpoint may be saved after the fit, when the callback has taken its order back.
        self._was_composed = self.train_order is not None
        ordered = seeded if self.train_order is None else OrderedDataset(seeded, self.train_order)
        loader = ResumableLoader(
            ordered, self.batch_size, sampler=sampler, drop_last=self.drop_last, **self._loader_options()
        )
        loader.before_first, loader.starts_late = self._require_awaited, trainer.strategy.restore_checkpoint_after_setup
        return loader

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return the loader of ``val_dataset``, in order, with evaluation transforms. It may be missing."""
        return [] if self.val_dataset is None else self._evaluation_loader(self.val_dataset)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of ``test_dataset``, in order, with evaluation transforms."""
        return self._evaluation_loader(_given(self.test_dataset, "test_dataset"))

    def predict_pairs(self) -> ImageTextDataset:
        """Return the pairs that ``Trainer.predict`` reads, those of :attr:`predict_split`, with evaluation transforms.

        Raises:
            MisconfigurationException: if that set was not given, or is no :class:`~lightning_itm.ImageTextDataset`.
        """
        dataset = _given(getattr(self, f"{self.predict_split}_dataset"), f"{self.predict_split}_dataset")
        pairs = getattr(dataset, "pairs", dataset)  # what wraps pairs has them: a stream, mined negatives
        if not isinstance(pairs, ImageTextDataset):
            raise MisconfigurationException(f"Expected an ImageTextDataset to predict, got {type(pairs).__name__}.")
        return pairs.evaluation()

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader of all images and one of all texts, as :class:`EvaluationItems` reads them."""
        items = [EvaluationItems(self.predict_pairs(), kind) for kind in KINDS]
        return [DataLoader(part, batch_size=self.eval_batch_size, **self._loader_options()) for part in items]

    def state_dict(self) -> dict[str, Any]:
        """Return where training is: the epoch, how many of its batches are done, and how many there ever were."""
        return self._position.state_dict(_given(self._training(), "trainer"), self._order_settings())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start where the checkpoint was written, if it is training that is resumed.

        Raises:
            MisconfigurationException: if the checkpoint was written in the middle of an epoch, and batches are others now.
        """
        # Lightning calls this hook in `validate`, `test` and `predict` as well, whose checkpoint says nothing of the next fit.
        trainer = _given(self.trainer, "trainer")
        if trainer.state.fn == TrainerFn.FITTING:
            self._position.load_state_dict(state_dict, trainer, self._order_settings())

    def _order_settings(self) -> dict[str, Any]:
        """Return what the batches of an epoch depend on, beside ranks."""
        return {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "set": identity_of(self.train_dataset),
            "num_workers": self.num_workers,
            "stream": self.train_dataset.settings() if isinstance(self.train_dataset, ShardStream) else None,
            "is_composed": self.train_order is not None or self._was_composed,
        }

    def _training(self) -> L.Trainer | None:
        return self.trainer if self._fit_trainer is None else self._fit_trainer

    def _require_awaited(self) -> None:
        # In the main process, which would publish it, and which would wait for workers that wait for it.
        if self.awaited is not None:
            self.awaited.require()

    def _next_batch(self) -> tuple[int, int]:
        return self._position.next_batch(self._training())

    def _check_train_dataset(self) -> None:
        """Raise if training can't begin. Not in the loader: Lightning leaves DataLoader patched after an error there."""
        is_given = self.train_dataset is not None or type(self).setup is ImageTextDataModule.setup  # or read later
        if is_given and type(self).train_dataloader is ImageTextDataModule.train_dataloader:
            self._check_one_batch(_given(self.train_dataset, "train_dataset"))

    def _stream_loader(self, stream: ShardStream, trainer: L.Trainer | None) -> StreamLoader:
        world_size, rank = (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)
        batches = StreamedBatches(
            stream, self.batch_size, drop_last=self.drop_last, rank=rank, world_size=world_size, seed=self.seed
        )
        # The workers yield whole batches, so the DataLoader has nothing to collate.
        options = {name: value for name, value in self._loader_options().items() if name != "collate_fn"}
        loader = StreamLoader(batches, self._next_batch, **options)
        loader.before_first = self._require_awaited
        return loader

    def _check_one_batch(self, dataset: Any) -> None:
        trainer = self._training()
        num_pairs = -(-len(dataset) // (1 if trainer is None else trainer.world_size))  # ranks are made equal
        if self.drop_last and num_pairs < self.batch_size:
            raise MisconfigurationException(
                f"Expected at least one batch of {self.batch_size} pairs a rank, got {num_pairs} pairs. "
                "Lower `batch_size`, or set `drop_last=False`."
            )

    def _evaluation_loader(self, dataset: Dataset[Any] | ShardStream) -> DataLoader[Any]:
        return DataLoader(evaluation_view(dataset), batch_size=self.eval_batch_size, **self._loader_options())

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.persistent_workers and self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": collate_pairs,
            # Of its own: the workers' seed is drawn from it, and not from the stream that dropout draws from.
            "generator": torch.Generator().manual_seed(self.seed),
        }


def _default_num_workers() -> int:
    # The cores of this process, which in a container are fewer than those of the machine.
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, usable)


def _given(value: Any, name: str) -> Any:
    if value is None:
        raise MisconfigurationException(f"Expected `{name}` to be given to ImageTextDataModule, got None.")
    return value
