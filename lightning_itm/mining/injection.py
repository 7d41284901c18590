"""How what was mined reaches the training steps: with the pairs, as embeddings, or by which pairs share a batch."""

import time
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from lightning_itm.data.datamodule import ImageTextDataModule
from lightning_itm.data.resumable_loader import EpochOrder
from lightning_itm.data.shards.stream import ShardStream
from lightning_itm.mining.embedded_negatives import EmbeddedNegatives
from lightning_itm.mining.encoded import EncodedPairs, SplitPairs
from lightning_itm.mining.hard_batches import check_group_size, compose_batches
from lightning_itm.mining.hard_negative_dataset import (
    HardNegativeDataset,
    check_batches_can_be_composed,
    pairs_to_mine,
    train_set,
)
from lightning_itm.mining.negative_table import NegativeTable
from lightning_itm.shared_integers import SharedIntegers


class Injection:
    """Bring what was mined to the training steps of one fit. The three subclasses are the three ways.

    Args:
        given: The dataset that the user names. ``None``: the datamodule's ``train_dataset``.
        table: What was mined. It may be published later.
        coupled_ranks: As :class:`HardNegativeDataset` takes it.
        seed: Another seed gives other draws of embeddings.
        group_size: Number of pairs of a group of hard batches.
    """

    is_fixed = False  # whether each epoch has what the first one had

    def __init__(
        self, given: Any, table: NegativeTable, *, coupled_ranks: bool = True, seed: int = 0, group_size: int = 4
    ) -> None:
        self.given, self.table = given, table
        self.coupled_ranks, self.seed, self.group_size = coupled_ranks, seed, group_size

    def attach(self, datamodule: Any, trainer: L.Trainer) -> None:
        """Prepare the training set, in ``setup``. Here: let the pairs come alone, without draws of an earlier callback.

        Args:
            datamodule: The Trainer's datamodule, or ``None``.
            trainer: The Trainer, which knows the number of ranks.
        """
        dataset = train_set(self.given, datamodule)
        if isinstance(dataset, ShardStream):
            dataset.negatives = None
        elif dataset is getattr(datamodule, "train_dataset", None):
            datamodule.train_dataset = pairs_to_mine(self.given, datamodule)

    def detach(self, datamodule: Any) -> None:
        """Undo :meth:`attach`, where the training set is still as it left it."""

    @property
    def awaited(self) -> SharedIntegers:
        """What must be published before the first batch is loaded."""
        return self.table

    def announce(self, *, is_new: bool = False) -> None:
        """Let workers wait for as long as mining takes.

        Args:
            is_new: Whether they must wait though something was published already, because a new epoch begins.
        """
        if is_new and not self.is_fixed:
            self.awaited.is_pending = True
        self.awaited.announce()

    def begin_epoch(self, epoch: int, encoded: EncodedPairs | SplitPairs | None = None) -> dict[str, float]:
        """Take in what was mined for an epoch, before its first batch is loaded. Return what can be logged.

        Args:
            epoch: The epoch that comes next.
            encoded: The embeddings that the table was mined from. ``None``: the table is that of an earlier epoch.
        """
        return {}

    def resume(self, state: dict[str, Any], device: torch.device) -> bool:
        """Take in the state of a checkpoint, and return whether it has all that the rest of its epoch needs."""
        return True

    def to_batch(self, batch: dict[str, Any], epoch: int) -> None:
        """Put what was mined into a batch that is on its device."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the table."""
        return {"embeddings": None}


class SampleInjection(Injection):
    """Let every pair come with a draw from the table, loaded and encoded like the pair itself."""

    def attach(self, datamodule: Any, trainer: L.Trainer) -> None:
        """Wrap the training set.

        Raises:
            MisconfigurationException: if no loader would read the draws, or the shards are remote.
        """
        dataset, options = train_set(self.given, datamodule), {"coupled_ranks": self.coupled_ranks}
        if isinstance(dataset, ShardStream):
            if not dataset.pairs.is_local:
                raise MisconfigurationException(
                    f"Expected local shards with `inject='samples'`, which reads mined images at random, got "
                    f"{dataset.pairs.contents.shards[0]}. Use `inject='embeddings'`, or copy the shards."
                )
            dataset.negatives = HardNegativeDataset(dataset.pairs, self.table, **options)
        elif isinstance(dataset, HardNegativeDataset) and (self.given is not None or datamodule is None):
            # The loader is the user's own and reads this object, so it gets the table.
            dataset.table, dataset.coupled_ranks = self.table, self.coupled_ranks
        elif getattr(datamodule, "train_dataset", None) in (dataset, pairs := pairs_to_mine(self.given, datamodule)):
            datamodule.train_dataset = HardNegativeDataset(pairs, self.table, **options)
        else:
            raise MisconfigurationException(
                "Expected an ImageTextDataModule with the pairs as `train_dataset`, or `dataset=HardNegativeDataset(pairs)` "
                "that the train loader reads, got neither. No negative would reach a batch."
            )
        if isinstance(datamodule, ImageTextDataModule):
            datamodule.awaited = self.table

    def detach(self, datamodule: Any) -> None:
        """Unwrap the training set, where the draws are still those of this table."""
        dataset = getattr(datamodule, "train_dataset", None)
        # What the user wrapped stays wrapped.
        if isinstance(dataset, HardNegativeDataset) and dataset is not self.given and dataset.table is self.table:
            datamodule.train_dataset, datamodule.awaited = dataset.pairs, None
        stream = dataset if self.given is None else self.given
        if isinstance(stream, ShardStream) and getattr(stream.negatives, "table", None) is self.table:
            stream.negatives = None


class EmbeddingInjection(Injection):
    """Put the embeddings of a draw from the table into every batch."""

    mined: EmbeddedNegatives | None = None

    def attach(self, datamodule: Any, trainer: L.Trainer) -> None:
        """Let the pairs come alone."""
        self.pairs = pairs_to_mine(self.given, datamodule)
        super().attach(datamodule, trainer)

    def begin_epoch(self, epoch: int, encoded: EncodedPairs | SplitPairs | None = None) -> dict[str, float]:
        """Draw from the new embeddings, if there are any."""
        if isinstance(encoded, EncodedPairs):
            self._draw_from(encoded.image_embeddings, encoded.text_embeddings)
        return {}

    def resume(self, state: dict[str, Any], device: torch.device) -> bool:
        """Draw from the embeddings of a checkpoint. One of a run with samples has none."""
        if state["embeddings"] is not None:
            self._draw_from(*(part.to(device) for part in state["embeddings"]))
            return True
        return not bool((state["texts"] >= 0).any())

    def to_batch(self, batch: dict[str, Any], epoch: int) -> None:
        """Put the drawn embeddings into the batch, without a wait of the host."""
        if self.mined is not None:
            batch["hard"] = self.mined.draw(batch["image_id"], batch["text_id"], epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the embeddings."""
        mined = self.mined
        return {"embeddings": mined and [mined.image_embeddings.cpu(), mined.text_embeddings.cpu()]}

    def _draw_from(self, image_embeddings: torch.Tensor, text_embeddings: torch.Tensor) -> None:
        text_image_id = self.pairs.text_image_id[: len(text_embeddings)]  # fewer than all in a trial run
        # Clones: the table is written anew at the end of the epoch, the draws of this epoch are of the earlier one.
        rows = self.table.texts.clone(), self.table.images.clone()
        options: dict[str, Any] = {"coupled_ranks": self.coupled_ranks, "seed": self.seed}
        options["caption_id"] = self.pairs.caption_id
        self.mined = EmbeddedNegatives(image_embeddings, text_embeddings, *rows, text_image_id, **options)


class BatchInjection(Injection):
    """Compose each epoch so that pairs that are hard for each other share a batch."""

    order: EpochOrder

    def attach(self, datamodule: Any, trainer: L.Trainer) -> None:
        """Give the datamodule an order that is composed later.

        Raises:
            MisconfigurationException: if the order of the pairs is not the datamodule's to choose, or the loss needs random
                batches.
            ValueError: if groups do not fit into batches.
        """
        pairs = pairs_to_mine(self.given, datamodule)
        check_batches_can_be_composed(train_set(self.given, datamodule), pairs, datamodule, trainer)
        super().attach(datamodule, trainer)
        self.batch_size, self.order_seed = datamodule.batch_size * trainer.world_size, datamodule.seed
        check_group_size(self.group_size, self.batch_size, len(pairs))
        self.pairs, self.is_fixed = pairs, trainer.overfit_batches > 0  # type: ignore[attr-defined]
        self.order = datamodule.train_order = datamodule.awaited = EpochOrder(len(pairs))

    def detach(self, datamodule: Any) -> None:
        """Let the datamodule draw its order again, and leave no file behind."""
        order = getattr(self, "order", None)
        if order is not None:  # it is, where `attach` refused the set-up
            if datamodule.train_order is order:
                datamodule.train_order = datamodule.awaited = None
            order.remove()

    @property
    def awaited(self) -> SharedIntegers:
        """The order, which is composed after mining."""
        return self.order

    def begin_epoch(self, epoch: int, encoded: EncodedPairs | SplitPairs | None = None) -> dict[str, float]:
        """Compose the order of an epoch from the table, and publish it."""
        if self.is_fixed and not self.order.is_pending:
            return {}  # with `overfit_batches`, each epoch has the batches of the first
        start = time.perf_counter()
        mined = self.table.texts, self.table.images, self.pairs.text_image_id
        options = {"group_size": self.group_size, "batch_size": self.batch_size, "seed": self.order_seed}
        composed = compose_batches(*mined, **options, caption_id=self.pairs.caption_id, epoch=epoch)
        self.order.publish(composed.order)
        if encoded is None:
            return {}
        fraction = composed.grouped_fraction()
        if fraction == 0 and self.group_size > 1:
            rank_zero_warn(
                f"Nothing was mined for epoch {epoch}: all negatives are above a guard, so its order is random. Lower "
                "`relative_margin`, or start later (`start_epoch`), with a model that has begun to match."
            )
        return {"mining/compose_seconds": time.perf_counter() - start, "mining/grouped_share": fraction}

    def resume(self, state: dict[str, Any], device: torch.device) -> bool:
        """Go on in the order of a checkpoint, unless its epoch is over: a worker that waits must not see it."""
        if state["is_finished"] and not self.is_fixed:
            return True
        if state.get("order") is None:  # of a run without one, which goes on at the start of an epoch: see Position
            self.begin_epoch(int(state["epoch"]))
        else:
            self.order.publish(state["order"])
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the order."""
        return {"embeddings": None, "order": self.order.pairs.clone()}


INJECTIONS = {"samples": SampleInjection, "embeddings": EmbeddingInjection, "batches": BatchInjection}
