"""Encode every image and every text of a set once, as for evaluation, and put the embeddings in the order of the ids.

``OfflineHardNegativeMining`` runs the whole pass with :func:`encode_pairs`. ``EmbeddingWriter`` and ``NegativeWriter`` let
``Trainer.predict`` drive the loop, and share with it what is read (:class:`~lightning_itm.data.EvaluationItems`) and how the
parts are put together (:class:`~lightning_itm.mining.EncodedRows`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lightning_itm.data.batch import collate_pairs
from lightning_itm.data.evaluation_items import EvaluationItems, Kind
from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.data.shards.dataset import ShardDataset
from lightning_itm.data.shards.loader import StreamedImages
from lightning_itm.distributed import broadcast_all
from lightning_itm.encoder_output import returning_vectors
from lightning_itm.functional.similarity import unit_norm
from lightning_itm.mining.encoded import Division, EncodedPairs, EncodedRows, OwnRows, SplitPairs, SplitRows
from lightning_itm.sharded_weights import split_again


class Runner(Protocol):
    """What encoding and searching ask of a Trainer. :func:`~lightning_itm.mine` has a stand-in for runs without one."""

    @property
    def world_size(self) -> int:
        """The number of processes that share the work."""

    @property
    def global_rank(self) -> int:
        """The number of this process, from 0."""

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process that shows progress and writes files."""

    @property
    def progress_bar_callback(self) -> Any:
        """None where no progress is shown."""

    @property
    def precision_plugin(self) -> Any:
        """Lightning's plugin, under which inputs are converted and encoded."""


def encode_pairs(
    trainer: Runner, module: Any, pairs: ImageTextDataset, num_texts: int, *, batch_size: int, num_workers: int
) -> EncodedPairs:
    """Encode each image and each text once, as for evaluation, split over the ranks. Every rank gets all embeddings.

    Args:
        trainer: The Trainer, whose precision, device and progress bar are used.
        module: The :class:`~lightning_itm.DualEncoder`. Its flags, random streams and gradients are as before afterwards.
        pairs: The set that is encoded.
        num_texts: How many of its texts are encoded, with their images. Fewer than all in a trial run.
        batch_size: Inputs that are encoded at once, such as 256. Lower it where memory is short.
        num_workers: Worker processes that load the inputs. 0: the main process loads them.

    Raises:
        ValueError: if an embedding is not finite.
    """
    text_image_id = pairs.text_image_id[:num_texts].to(module.device)
    options: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers}
    if isinstance(pairs, ShardDataset) and not pairs.is_local:
        num_images = len(pairs.images)  # shards are read from front to back, so a part costs as much as all
        images = _stream(trainer, pairs, **options)
    else:
        num_images = int(text_image_id.max()) + 1
        images = _loader(pairs, "image", num_images, _every_nth(trainer, num_images), **options)
    texts = _loader(pairs, "text", num_texts, _every_nth(trainer, num_texts), **options)
    # `no_grad`, not `inference_mode`: the loss multiplies these embeddings with tensors that have a gradient.
    with torch.no_grad(), _as_for_evaluation(trainer, module), trainer.precision_plugin.forward_context():
        image_embeddings, image_is_valid = _encode(trainer, module, images, EncodedRows("image", num_images))
        text_embeddings, text_is_valid = _encode(trainer, module, texts, EncodedRows("text", num_texts))
    caption_id = None if pairs.caption_id is None else pairs.caption_id[:num_texts].to(module.device)
    return EncodedPairs(image_embeddings, text_embeddings, text_image_id, image_is_valid, text_is_valid, caption_id)


def encode_split_pairs(
    trainer: Runner, module: Any, pairs: ImageTextDataset, num_texts: int, *, batch_size: int, num_workers: int
) -> SplitPairs:
    """Encode each image and each text once, like :func:`encode_pairs`. The embeddings stay on the rank that made them.

    Args:
        trainer: The Trainer, whose precision, device and progress bar are used.
        module: The :class:`~lightning_itm.DualEncoder`.
        pairs: The set that is encoded.
        num_texts: How many of its texts are encoded, with their images.
        batch_size: Inputs that are encoded at once.
        num_workers: Worker processes that load the inputs.

    Raises:
        ValueError: if an embedding is not finite, or the set is of remote shards, which are not read by number.
    """
    if isinstance(pairs, ShardDataset) and not pairs.is_local:
        raise ValueError(
            f"Expected local shards with `split_embeddings=True`, where each rank encodes its own rows, got "
            f"{pairs.contents.shards[0]}. Copy the shards, or leave `split_embeddings` out."
        )
    text_image_id = pairs.text_image_id[:num_texts].to(module.device)
    encoded: dict[Kind, tuple[SplitRows, Tensor]] = {}
    num_rows: dict[Kind, int] = {"image": int(text_image_id.max()) + 1, "text": num_texts}
    with torch.no_grad(), _as_for_evaluation(trainer, module), trainer.precision_plugin.forward_context():
        for kind, num in num_rows.items():
            division = Division(num, trainer.global_rank, trainer.world_size)
            loader = _loader(pairs, kind, num, _own_rows(division), batch_size=batch_size, num_workers=num_workers)
            encoded[kind] = _encode(trainer, module, loader, OwnRows(kind, division, module.device))
    (images, image_is_valid), (texts, text_is_valid) = encoded["image"], encoded["text"]
    caption_id = None if pairs.caption_id is None else pairs.caption_id[:num_texts].to(module.device)
    return SplitPairs(images, texts, text_image_id, image_is_valid, text_is_valid, caption_id)


def _every_nth(trainer: Runner, num_rows: int) -> list[int]:
    num_own = -(-num_rows // trainer.world_size)  # as many on every rank, so the last row may come twice
    return [min(i * trainer.world_size + trainer.global_rank, num_rows - 1) for i in range(num_own)]


def _own_rows(division: Division) -> list[int]:
    own = division.own
    most = max(division.start(rank + 1) - division.start(rank) for rank in range(division.world_size))
    # As many on every rank, because a call of an encoder may wait for the other ranks: the last row comes again. A rank that
    # has none encodes the first row of the set, which is not kept.
    return [min(own.start + i, own.stop - 1) for i in range(most)] if own.stop > own.start else [0] * most


def _loader(
    pairs: ImageTextDataset, kind: Kind, num_rows: int, own_rows: list[int], **options: Any
) -> DataLoader[dict[str, Any]]:
    items = EvaluationItems(pairs, kind, num_rows)
    return DataLoader(items, sampler=own_rows, collate_fn=collate_pairs, **_options(), **options)


def _stream(trainer: Runner, pairs: ShardDataset, **options: Any) -> DataLoader[dict[str, Any]]:
    view: Any = pairs.evaluation()
    images = StreamedImages(view, rank=trainer.global_rank, world_size=trainer.world_size)
    return DataLoader(images, collate_fn=collate_pairs, **_options(), **options)


def _options() -> dict[str, Any]:
    return {
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator(),  # of its own: no number is drawn from the streams of the run
    }


def _encode(
    trainer: Runner, module: Any, loader: DataLoader[dict[str, Any]], rows: EncodedRows | OwnRows
) -> tuple[Any, Tensor]:
    kind = rows.kind
    encode = returning_vectors(getattr(module, f"encode_{kind}"), kind)
    num_batches = -(-rows.num_rows // (trainer.world_size * (loader.batch_size or 1)))
    # An iterator: of a loader tqdm makes one more, whose workers would load batches that are never used.
    progress = tqdm(iter(loader), f"Mining: {kind}s", num_batches, leave=False, disable=not _is_progress_shown(trainer))
    for batch in progress:
        # All at once, and before encoding: from pinned memory, and the host goes on to the next batch.
        batch = move_data_to_device(trainer.precision_plugin.convert_input(batch), module.device)
        rows.add({**batch, kind: unit_norm(encode(batch[kind])).float()})  # (batch, dim)
    where, kept = f" when mining on rank {trainer.global_rank}", ""
    if isinstance(trainer, L.Trainer):
        where, kept = f"{where}, epoch {trainer.current_epoch}", "The earlier table is kept. "
    return rows.in_order(during=where, way_out=f"{kept}Lower the learning rate, or clip gradients.")


def part_of(trainer: Runner) -> dict[str, Any]:
    """Return which part of a search this process has, as ``find_negatives`` takes it, and whether it shows progress."""
    return {"rank": trainer.global_rank, "world_size": trainer.world_size, "is_shown": _is_progress_shown(trainer)}


def _is_progress_shown(trainer: Runner) -> bool:
    return trainer.progress_bar_callback is not None and trainer.is_global_zero


@contextmanager
def _as_for_evaluation(trainer: Runner, module: nn.Module) -> Iterator[None]:
    # Part by part: a user may keep some of them in eval mode while the rest is trained.
    flags = [(part, part.training) for part in module.modules()]
    # Batch statistics are each rank's own until the next step, before which DDP takes those of rank 0, as a checkpoint does.
    # With its own, each rank would encode with another model, and a resumed run would mine another table.
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()] if trainer.world_size > 1 else []
    module.eval()
    try:
        broadcast_all((buffer for buffer, _ in kept), 0)
        yield
    finally:
        split_again(module)
        for buffer, own in kept:
            buffer.copy_(own)
        for part, flag in flags:
            part.training = flag
