"""Order and draws as functions of (seed, epoch, id), so that a run that stopped anywhere can go on as if it had not."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_itm.randomness import seeded


class SeededDataset(Dataset[Any]):
    """Load each sample with random streams of its own: a function of (seed, epoch, index), in whichever process.

    Args:
        dataset: Any dataset with random access.
        seed: Of the draws.
    """

    def __init__(self, dataset: Dataset[Any], seed: int = 0) -> None:
        self.dataset, self.seed = dataset, seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared: running workers see a new epoch

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        with seeded(self.seed, int(self.epoch), int(index)):
            return self.dataset[index]


class EpochSampler(DistributedSampler[Any]):
    """Yield the indices of one rank for one epoch, from a given batch on.

    Args:
        dataset: What is sampled. It is told the epoch, so that workers that are already running know for which they draw.
        batch_size: Pairs a batch on one rank: how many indices each batch that is already done stands for.
        position: Called when an iterator is made; returns the epoch, and how many of its batches are done.
        shuffle: Draw a new order each epoch, or keep that of the dataset.
        num_replicas: Number of ranks.
        rank: This rank.
        seed: The order is a function of it and the epoch.
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
        epoch, num_done = self.position()
        self.set_epoch(epoch)
        self.shared_epoch.fill_(epoch)
        return iter(list(super().__iter__())[num_done * self.batch_size :])


class ResumableLoader(DataLoader[Any]):
    """A DataLoader whose position is kept by the datamodule; it says so, or Lightning warns at every mid-epoch resume."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the position is in the datamodule's state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: the sampler asks the datamodule for the position."""
