"""Order and draws as functions of (seed, epoch, id), so that a run that stopped anywhere can go on as if it had not.

:mod:`~lightning_itm.data.position` explains when Lightning asks for what.
"""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_itm.randomness import seeded
from lightning_itm.shared_integers import SharedIntegers


def random_order(num_pairs: int, seed: int, epoch: int) -> Tensor:
    """Return the order in which :class:`EpochSampler` reads the pairs of an epoch, int64 `(pairs,)`.

    Args:
        num_pairs: Number of pairs of the set.
        seed: The seed of the datamodule.
        epoch: The epoch, from 0. Each has an order of its own.
    """
    return torch.randperm(num_pairs, generator=torch.Generator().manual_seed(seed + epoch))


class EpochOrder(SharedIntegers):
    """Hold the order of an epoch's pairs where a callback composes it, in a file that all processes map.

    The sampler then yields positions, and :class:`OrderedDataset` looks up the pair of each in the worker that loads it. So a
    worker that starts early waits for the order, and one that goes on from epoch to epoch sees the new order.

    Args:
        num_pairs: Number of pairs of the set, which is the number of positions.
    """

    missing: ClassVar[str] = "no order was composed before the first batch"

    def __init__(self, num_pairs: int) -> None:
        super().__init__(((num_pairs,),))
        self.is_pending = True

    @property
    def pairs(self) -> Tensor:
        """int32 `(pairs,)`, the number of the pair at each position of the epoch."""
        return self.tensors[0]

    def publish(self, pairs: Tensor) -> None:
        """Write the order of the next epoch, and let waiting workers go on.

        Args:
            pairs: Integers `(pairs,)`, each pair of the set once.
        """
        self.copy_(pairs)


class OrderedDataset(Dataset[Any]):
    """Load the pair that stands at a position of the epoch.

    Args:
        dataset: Any dataset with random access.
        order: Which pair stands where. It may be published later, and anew for each epoch.
    """

    def __init__(self, dataset: Dataset[Any], order: EpochOrder) -> None:
        self.dataset, self.order = dataset, order

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        self.order.wait()  # a worker may be asked for its first batch before anything is composed
        return self.dataset[int(self.order.pairs[index])]


class SeededDataset(Dataset[Any]):
    """Load each sample with random streams of its own: a function of (seed, epoch, index), in whichever process.

    Args:
        dataset: Any dataset with random access.
        seed: The seed of augmentation and other draws. Another one gives another run.
    """

    def __init__(self, dataset: Dataset[Any], seed: int = 0) -> None:
        self.dataset, self.seed = dataset, seed
        # In shared memory: persistent workers hold a copy of this object, and see a new epoch only there.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        with seeded(self.seed, int(self.epoch), int(index)):
            return self.dataset[index]


class EpochSampler(DistributedSampler[Any]):
    """Yield the indices of one rank for one epoch, from a given batch on.

    Args:
        dataset: The dataset that is sampled. It is told the epoch, so that workers that are already running know it, too.
        batch_size: Number of pairs per batch on one rank. So many indices are skipped for each batch that is done.
        position: Returns the epoch, and how many of its batches are done. It is called whenever an iterator is made.
        shuffle: Draw a new order for each epoch, that of :func:`random_order`. Turn it off to keep the order of the dataset.
        num_replicas: The number of ranks. Each of them gets equally many indices.
        rank: The number of this rank, from 0.
        seed: The seed of the order. It must be the same on all ranks.
    """

    def __init__(
        self,
        dataset: SeededDataset,
        batch_size: int,
        position: Callable[[], tuple[int, int]],
        *,
        shuffle: bool = True,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)
        self.shared_epoch = dataset.epoch
        self.batch_size = batch_size
        self.position = position

    def __iter__(self) -> Iterator[Any]:
        # Asked here and not in `set_epoch`, which Lightning calls with its own count, when workers already fetch.
        epoch, num_done = self.position()
        self.set_epoch(epoch)
        self.shared_epoch.fill_(epoch)
        # All indices are drawn first, so that the rest of an epoch is the rest of the same order.
        return iter(list(super().__iter__())[num_done * self.batch_size :])


class ResumableLoader(DataLoader[Any]):
    """Load batches, from the position that the datamodule keeps.

    The two methods of the state are there for Lightning, which else warns at every resume in the middle of an epoch.

    Attributes:
        before_first: A function that is called before the first batch of each iterator is asked for. It may raise.
        starts_late: Whether workers start when the first batch is asked for. Set it where the position may be restored after
            an iterator is made, as with strategies that shard the weights.
    """

    before_first: Callable[[], None] | None = None
    starts_late = False

    def __iter__(self) -> Any:
        start = super().__iter__
        # Workers start now, before the first batch is asked for, unless the position may still change.
        batches = _started_late(start) if self.starts_late else start()
        return batches if self.before_first is None else _checked(batches, self.before_first)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing, because the position is in the datamodule's state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing, because the sampler asks the datamodule for the position."""


def _started_late(start: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    yield from start()


def _checked(batches: Iterator[Any], before_first: Callable[[], None]) -> Iterator[Any]:
    before_first()
    yield from batches
