"""Let the pairs of a training set come with draws from a table of mined negatives, and undo that after the fit."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.data.shards.stream import ShardStream
from lightning_itm.mining.hard_negative_dataset import HardNegativeDataset
from lightning_itm.mining.negative_table import NegativeTable


def pairs_to_mine(given: Any, datamodule: Any) -> ImageTextDataset:
    """Return the pairs of a training set without what wraps them.

    Args:
        given: The dataset that the user names. ``None``: the datamodule's ``train_dataset``.
        datamodule: The Trainer's datamodule, or ``None``.

    Raises:
        MisconfigurationException: if there are no pairs, or fewer than two images.
    """
    dataset = _dataset(given, datamodule)
    pairs = dataset.pairs if isinstance(dataset, HardNegativeDataset | ShardStream) else dataset
    if not isinstance(pairs, ImageTextDataset):
        raise MisconfigurationException(
            f"Expected pairs to mine, got {type(pairs).__name__}. Give `dataset=ImageTextDataset(...)`, or fit with an "
            "ImageTextDataModule that has them as `train_dataset`."
        )
    if len(pairs.images) < 2:
        raise MisconfigurationException(f"Expected at least two images to mine among, got {len(pairs.images)}.")
    return pairs


def attach_draws(given: Any, datamodule: Any, table: NegativeTable, *, coupled_ranks: bool) -> None:
    """Let every pair of a training set come with a draw from the table.

    Args:
        given: The dataset that the user names. ``None``: the datamodule's ``train_dataset``.
        datamodule: The Trainer's datamodule, or ``None``.
        table: What is drawn from. It may be published later.
        coupled_ranks: As :class:`HardNegativeDataset` takes it.

    Raises:
        MisconfigurationException: if no loader would read the draws, or the shards are remote.
    """
    dataset = _dataset(given, datamodule)
    if isinstance(dataset, ShardStream):
        if not dataset.pairs.is_local:
            raise MisconfigurationException(
                f"Expected local shards with `inject='samples'`, which reads mined images at random, got "
                f"{dataset.pairs.contents.shards[0]}. Use `inject='embeddings'`, or copy the shards."
            )
        dataset.negatives = HardNegativeDataset(dataset.pairs, table, coupled_ranks=coupled_ranks)
    elif isinstance(dataset, HardNegativeDataset) and (given is not None or datamodule is None):
        # The loader is the user's own and reads this object, so it gets the table.
        dataset.table, dataset.coupled_ranks = table, coupled_ranks
    elif getattr(datamodule, "train_dataset", None) in (dataset, pairs := pairs_to_mine(given, datamodule)):
        datamodule.train_dataset = HardNegativeDataset(pairs, table, coupled_ranks=coupled_ranks)
    else:
        raise MisconfigurationException(
            "Expected an ImageTextDataModule with the pairs as `train_dataset`, or `dataset=HardNegativeDataset(pairs)` "
            "that the train loader reads, got neither. No negative would reach a batch."
        )


def clear_draws(given: Any, datamodule: Any) -> None:
    """Let the pairs come alone, without the draws that an earlier callback attached. Arguments as above."""
    dataset = _dataset(given, datamodule)
    if isinstance(dataset, ShardStream):
        dataset.negatives = None
    elif dataset is getattr(datamodule, "train_dataset", None):
        datamodule.train_dataset = pairs_to_mine(given, datamodule)


def detach_draws(given: Any, datamodule: Any, table: NegativeTable) -> None:
    """Undo :func:`attach_draws`, where the draws are still those of this table. Arguments as above."""
    dataset = getattr(datamodule, "train_dataset", None)
    # What the user wrapped stays wrapped.
    if isinstance(dataset, HardNegativeDataset) and dataset is not given and dataset.table is table:
        datamodule.train_dataset = dataset.pairs
    stream = dataset if given is None else given
    if isinstance(stream, ShardStream) and getattr(stream.negatives, "table", None) is table:
        stream.negatives = None


def _dataset(given: Any, datamodule: Any) -> Any:
    return getattr(datamodule, "train_dataset", None) if given is None else given
