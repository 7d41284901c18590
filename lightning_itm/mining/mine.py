"""Encode a set, search it, and publish what was mined."""

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
import torch

from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.mining.encode import encode_pairs, encode_split_pairs, part_of
from lightning_itm.mining.encoded import EncodedPairs, SplitPairs
from lightning_itm.mining.injection import INJECTIONS
from lightning_itm.mining.negative_table import NegativeTable, check_state, fingerprint
from lightning_itm.mining.search import fill_table
from lightning_itm.mining.training_embeddings import TrainingEmbeddings

FAST_DEV_RUN_PAIRS = 512


def mine_into(
    table: NegativeTable,
    pairs: ImageTextDataset,
    trainer: L.Trainer,
    module: L.LightningModule,
    *,
    batch_size: int,
    num_workers: int | None,
    training_embeddings: TrainingEmbeddings | None = None,
    split_embeddings: bool = False,
    **guards: Any,
) -> tuple[EncodedPairs | SplitPairs | None, dict[str, float]]:
    """Mine the negatives of a set with a model as it stands, and publish them. Every rank must call it.

    Args:
        table: Where the negatives are written. It says how many are kept, too. If encoding fails, it stays as it was.
        pairs: The set. With ``fast_dev_run``, its first 512 texts and their images are enough.
        trainer: The Trainer, whose ranks share the work.
        module: The :class:`~lightning_itm.DualEncoder` that encodes.
        batch_size: Inputs that are encoded at once, such as 256.
        num_workers: Worker processes that load the inputs. ``None``: as many as the datamodule has.
        training_embeddings: What the training steps computed, which is then mined, and nothing is encoded.
        split_embeddings: Let each rank keep its own embeddings only.
        **guards: As :func:`find_negatives` takes them, and so the way to search.

    Returns:
        The embeddings, and what can be logged: seconds, gap, and fractions. None and nothing where no step was trained so far.

    Raises:
        ValueError: if an embedding is not finite.
    """
    start = time.perf_counter()
    if training_embeddings is None:
        num_texts = min(len(pairs), FAST_DEV_RUN_PAIRS) if trainer.fast_dev_run else len(pairs)  # type: ignore[attr-defined]
        of_datamodule: int = getattr(trainer.datamodule, "num_workers", 0)  # type: ignore[attr-defined]
        options = {"batch_size": batch_size, "num_workers": of_datamodule if num_workers is None else num_workers}
        encode = encode_split_pairs if split_embeddings else encode_pairs
        encoded = encode(trainer, module, pairs, num_texts, **options)
    elif training_embeddings.rows is None:
        return None, {}
    else:
        encoded = training_embeddings.encoded()
    between = time.perf_counter()
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # so few can't fill the lists of an index for all
        guards.pop("faiss_index", None)
    measured = fill_table(table, encoded, **part_of(trainer), **guards)
    seconds = {"mining/encode_seconds": between - start, "mining/search_seconds": time.perf_counter() - between}
    return encoded, {**seconds, **measured}


@dataclass
class MiningProgress:
    """Say which epoch the table is for. It is advanced after the work, so that interrupted mining never counts as done.

    Args:
        epoch: The epoch that has its table, or −1 before the first.
        is_finished: Whether all batches of this epoch are done.
        is_mined: Whether anything was mined so far.
    """

    epoch: int = -1
    is_finished: bool = False
    is_mined: bool = False

    @classmethod
    def of(cls, state: dict[str, Any]) -> "MiningProgress":
        """Return what a checkpoint says. Older ones do not say whether anything was mined, but their table shows it."""
        is_mined = bool(state["is_mined"] if "is_mined" in state else (state["texts"] >= 0).any())
        return cls(int(state["epoch"]), bool(state["is_finished"]), is_mined)

    def is_before(self, epoch: int) -> bool:
        """Return whether an epoch still needs a table or an order of its own."""
        return self.is_finished or epoch > self.epoch

    def must_mine(self, epoch: int, is_due: Callable[[int], bool]) -> bool:
        """Return whether an epoch begins with mining: if it is due, or if it was due and nothing was mined so far.

        Args:
            epoch: The epoch that begins. A callback that joins a run may be asked for a late one first.
            is_due: The schedule, a function of the epoch.
        """
        return is_due(epoch) or (not self.is_mined and any(is_due(earlier) for earlier in range(epoch)))

    def begin(self, epoch: int) -> None:
        """Say that an epoch has its table."""
        self.epoch, self.is_finished = epoch, False


class Mining:
    """Hold what one fit mines: the pairs, the table, how it reaches the steps, and the embeddings where training has them.

    Args:
        pairs: The set that is mined.
        given: The dataset that the user named, which may wrap the pairs, or ``None``.
        inject: One of the ways of :mod:`~lightning_itm.mining.injection`.
        encode: ``"pass"`` or ``"training"``.
        counts: ``texts_per_image`` and ``images_per_text`` of the table.
        ways: ``coupled_ranks``, ``seed`` and ``group_size``, as the injection takes them.

    Attributes:
        progress: Which epoch the table is for.
        first_epoch: The epoch in which a resumed run goes on. None in a run that starts anew.
    """

    def __init__(
        self,
        pairs: ImageTextDataset,
        given: Any,
        *,
        inject: str,
        encode: str,
        counts: dict[str, int],
        ways: dict[str, Any],
    ) -> None:
        self.pairs, self.progress, num_images = pairs, MiningProgress(), len(pairs.images)
        self._restored: dict[str, Any] | None = None
        self._unlogged: dict[str, float] = {}
        self.first_epoch: int | None = None
        self.table = NegativeTable(num_images, len(pairs.texts), **counts)
        self.table.is_pending = True  # a fit's first workers may ask before `on_fit_start`, and wait
        self.injection = INJECTIONS[inject](given, self.table, **ways)
        parts = pairs.text_image_id, num_images, pairs.caption_id
        self.training_embeddings = TrainingEmbeddings(*parts) if encode == "training" else None

    def begin_epoch(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        epoch: int,
        is_due: Callable[[int], bool],
        *,
        must_mine: bool = False,
        **options: Any,
    ) -> None:
        """Mine for an epoch, or let it go on with what there is.

        Args:
            trainer: The Trainer, whose ranks share the work.
            module: The module that encodes.
            epoch: The epoch whose first batch comes next.
            is_due: The schedule, a function of the epoch.
            must_mine: Mine, whatever the schedule says.
            **options: Those of :func:`mine_into`.
        """
        if must_mine or self.progress.must_mine(epoch, is_due):
            self._unlogged = self.mine(trainer, module, epoch, **options)
        else:
            self._unlogged = self.injection.begin_epoch(epoch)
        # Last: a checkpoint of a run that was interrupted above must not say that this was done.
        self.progress.begin(epoch)
        self.table.is_pending = False

    def take_logs(self) -> dict[str, float]:
        """Return what can be logged of the last mining, once."""
        logs, self._unlogged = self._unlogged, {}
        return logs

    def mine(self, trainer: L.Trainer, module: L.LightningModule, epoch: int, **options: Any) -> dict[str, float]:
        """Mine for an epoch. ``options`` are those of :func:`mine_into`, and what is returned can be logged."""
        of_training = self.training_embeddings
        if of_training is not None:
            of_training.to(module.device)  # after a resume they are on the CPU
        encoded, logs = mine_into(self.table, self.pairs, trainer, module, training_embeddings=of_training, **options)
        logs.update(self.injection.begin_epoch(epoch, encoded))
        self.progress.is_mined = encoded is not None  # training embeddings are mined from the second epoch on
        return logs

    def resume(self, device: torch.device) -> bool:
        """Let the injection go on as the checkpoint says, if there is one. Return whether it has all that it needs."""
        restored, self._restored = self._restored, None
        return restored is None or self.injection.resume(restored, device)

    @functools.cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.pairs)  # reads all texts, so not for each checkpoint

    def state_dict(self) -> dict[str, Any]:
        """Return the table, its epoch and set, what its injection needs, and the embeddings that are to be mined."""
        table = {"texts": self.table.texts.clone(), "images": self.table.images.clone()}
        identity = {"fingerprint": self._fingerprint, "set": self.pairs.identity()}
        state: dict[str, Any] = {**table, **identity, **asdict(self.progress), **self.injection.state_dict()}
        if self.training_embeddings is not None:
            state["training_embeddings"] = self.training_embeddings.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any], is_due: Callable[[int], bool]) -> None:
        """Take in the table of a checkpoint. The injection follows with ``resume``, when the model is on its device.

        Args:
            state: What :meth:`state_dict` returned.
            is_due: The schedule. Where mining follows at once, no worker may see this table.

        Raises:
            ValueError: if the table is of another training set, or has other numbers of negatives.
        """
        check_state(state, self.pairs, self.table)
        if self.training_embeddings is not None and "training_embeddings" in state:
            self.training_embeddings.load_state_dict(state["training_embeddings"])
        self.table.texts.copy_(state["texts"])  # also what the next mining is compared with
        self.table.images.copy_(state["images"])
        self._restored, self.progress = state, MiningProgress.of(state)
        epoch = self.progress.epoch if self.first_epoch is None else self.first_epoch
        self.progress.epoch = min(self.progress.epoch, epoch)  # older versions counted an epoch that was broken off
        if not (self.progress.is_before(epoch) and self.progress.must_mine(epoch, is_due)):
            self.table.is_pending = False
