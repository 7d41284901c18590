"""Encode every image and every text of a set once, as for evaluation, and put the embeddings in the order of the ids.

``OfflineHardNegativeMining`` runs the whole pass with :func:`encode_pairs`. ``EmbeddingWriter`` and ``NegativeWriter`` let
``Trainer.predict`` drive the loop, and share with it what is read (:class:`~lightning_itm.data.EvaluationItems`) and how the
parts are put together (:class:`EncodedRows`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lightning_itm.captions import captions_of_images
from lightning_itm.data.batch import collate_pairs
from lightning_itm.data.evaluation_items import EvaluationItems, Kind
from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.data.shards.dataset import ShardDataset
from lightning_itm.data.shards.loader import StreamedImages
from lightning_itm.distributed import gather, world_size
from lightning_itm.encoder_output import returning_vectors
from lightning_itm.functional.similarity import unit_norm


@dataclass
class EncodedPairs:
    """Hold the embeddings of a whole set, in the order of the ids.

    Args:
        image_embeddings: `(images, dim)`, unit-norm.
        text_embeddings: `(texts, dim)`, unit-norm.
        text_image_id: int64 `(texts,)`, the image that each text belongs to.
        image_is_valid: bool `(images,)`, whether the image could be read. Afterwards false also where none of its texts could.
        text_is_valid: bool `(texts,)`, whether the text could be read. Afterwards false also where its image could not.
        caption_id: int64 `(texts,)`, the number of the caption of each text. Default: captions are not compared.
    """

    image_embeddings: Tensor
    text_embeddings: Tensor
    text_image_id: Tensor
    image_is_valid: Tensor
    text_is_valid: Tensor
    caption_id: Tensor | None = None

    def __post_init__(self) -> None:
        # What is mined is a pair: a text comes with its image, and an image with one of its texts.
        self.text_is_valid = self.text_is_valid & self.image_is_valid[self.text_image_id]
        num_readable = torch.bincount(self.text_image_id[self.text_is_valid], minlength=len(self.image_embeddings))
        self.image_is_valid = num_readable > 0  # (images,)

    def positive(self) -> tuple[Tensor, Tensor]:
        """Return the similarity of the matching pairs.

        Returns:
            For each image the mean over its valid texts, `(images,)`, and for each text that with its image, `(texts,)`.
        """
        of_text = (self.image_embeddings[self.text_image_id] * self.text_embeddings).sum(dim=1)  # (texts,)
        num_images, is_valid = len(self.image_embeddings), self.text_is_valid
        of_valid = torch.where(is_valid, of_text, 0)
        of_image = of_text.new_zeros(num_images).index_add_(0, self.text_image_id, of_valid)  # (images,), a sum so far
        num_valid = torch.bincount(self.text_image_id, weights=is_valid.to(of_text.dtype), minlength=num_images)
        return of_image / num_valid.clamp_min(1).to(of_text.dtype), of_text

    def captions(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the captions of each image, `(images, most)`, filled up with −1, and that of each text, `(texts, 1)`."""
        if self.caption_id is None:
            return None, None
        of_image = captions_of_images(self.caption_id, self.text_image_id, len(self.image_embeddings))
        return of_image, self.caption_id[:, None]


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


class EncodedRows:
    """Collect the embeddings of all images, or of all texts, batch by batch, and put those of all ranks in order.

    Args:
        kind: ``"image"`` or ``"text"``, which names the keys of the batches.
        num_rows: How many there are, on all ranks together. Their ids are below it.
    """

    def __init__(self, kind: Kind, num_rows: int) -> None:
        self.kind, self.num_rows = kind, num_rows
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, batch: Mapping[str, Any]) -> None:
        """Keep the embeddings of a batch on their device, so that the host waits for nothing.

        Args:
            batch: A dict with, for images, ``"image"`` (embeddings), ``"image_id"`` and ``"image_is_valid"``.
        """
        self._parts.append((batch[self.kind], batch[f"{self.kind}_id"], batch[f"{self.kind}_is_valid"]))

    def in_order(self, *, way_out: str, during: str = "") -> tuple[Tensor, Tensor]:
        """Gather the rows of all ranks. Every rank must call it, and every rank gets everything.

        Args:
            way_out: What a user can do about embeddings that are not finite, a sentence for the message.
            during: What was done meanwhile, such as ``" when mining"``, for the message. Default: nothing.

        Returns:
            Embeddings `(num_rows, dim)` and validity `(num_rows,)`. The row is the id.

        Raises:
            ValueError: if an embedding is not finite.
        """
        embeddings, ids, is_valid = (_gather_rows(torch.cat(parts)) for parts in zip(*self._parts, strict=True))
        self._parts = []
        # The first host read of the pass: all batches are encoded by now.
        if not bool(embeddings.isfinite().all()):
            raise ValueError(f"Expected finite {self.kind} embeddings{during}, got NaN or infinity. {way_out}")
        # Ids that come twice, where ranks were made equal, carry equal rows, so the order of writing does not matter.
        in_order = embeddings.new_zeros(self.num_rows, embeddings.shape[1]).index_copy_(0, ids, embeddings)
        return in_order, is_valid.new_zeros(self.num_rows).index_copy_(0, ids, is_valid)


def _gather_rows(rows: Tensor) -> Tensor:
    if world_size() > 1:
        # Lightning's sampler for `predict` gives some ranks a row more, and a gather takes equal shapes.
        most = int(gather(torch.tensor([len(rows)], device=rows.device)).max())
        rows = torch.cat([rows, rows[-1:].repeat_interleave(most - len(rows), dim=0)])  # the last row again
    return gather(rows)


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
        images = _loader(trainer, pairs, "image", num_images, **options)
    texts = _loader(trainer, pairs, "text", num_texts, **options)
    # `no_grad`, not `inference_mode`: the loss multiplies these embeddings with tensors that have a gradient.
    with _in_eval_mode(module), torch.no_grad(), trainer.precision_plugin.forward_context():
        image_embeddings, image_is_valid = _encode(trainer, module, "image", images, num_images)
        text_embeddings, text_is_valid = _encode(trainer, module, "text", texts, num_texts)
    caption_id = None if pairs.caption_id is None else pairs.caption_id[:num_texts].to(module.device)
    return EncodedPairs(image_embeddings, text_embeddings, text_image_id, image_is_valid, text_is_valid, caption_id)


def _loader(
    trainer: Runner, pairs: ImageTextDataset, kind: Kind, num_rows: int, **options: Any
) -> DataLoader[dict[str, Any]]:
    num_own = -(-num_rows // trainer.world_size)  # as many on every rank, so the last row may come twice
    own_rows = [min(i * trainer.world_size + trainer.global_rank, num_rows - 1) for i in range(num_own)]
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
    trainer: Runner, module: Any, kind: Kind, loader: DataLoader[dict[str, Any]], num_rows: int
) -> tuple[Tensor, Tensor]:
    encode, rows = returning_vectors(getattr(module, f"encode_{kind}"), kind), EncodedRows(kind, num_rows)
    num_batches = -(-num_rows // (trainer.world_size * (loader.batch_size or 1)))
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
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    # Part by part: a user may keep some of them in eval mode while the rest is trained.
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, flag in flags:
            part.training = flag
