"""One pass over a set: every image and every text encoded once, as for evaluation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm

from lightning_itm.data.batch import pad_if_ragged
from lightning_itm.data.pairs import ImageTextDataset, UnreadablePairError
from lightning_itm.data.shards.dataset import ShardDataset
from lightning_itm.data.shards.loader import StreamedImages
from lightning_itm.distributed import gather
from lightning_itm.functional.similarity import unit_norm


@dataclass
class EncodedPairs:
    """The embeddings of a set, by id, and which could be read."""

    image: Tensor
    text: Tensor
    text_image_id: Tensor
    image_is_valid: Tensor
    text_is_valid: Tensor

    def __post_init__(self) -> None:
        """Mine a text with its image, and an image with a text of it."""
        self.text_is_valid = self.text_is_valid & self.image_is_valid[self.text_image_id]
        self.image_is_valid = torch.bincount(self.text_image_id[self.text_is_valid], minlength=len(self.image)) > 0

    def positive(self) -> tuple[Tensor, Tensor]:
        """Return the similarity of each image and its texts, in the mean, and of each text and its image."""
        of_text = (self.image[self.text_image_id] * self.text).sum(dim=1)
        of_image = of_text.new_zeros(len(self.image)).index_add_(0, self.text_image_id, of_text)
        return of_image / torch.bincount(self.text_image_id, minlength=len(self.image)).clamp_min(1), of_text


def encode_pairs(
    trainer: L.Trainer, module: Any, pairs: ImageTextDataset, num_texts: int, *, batch_size: int, num_workers: int
) -> EncodedPairs:
    """Encode each image and each text once, as for evaluation, split over the ranks; every rank gets all.

    Args:
        trainer: Whose precision, device and progress bar are used.
        module: A :class:`~lightning_itm.DualEncoder`; its flags, random streams and gradients are as before.
        pairs: The set.
        num_texts: How many of its texts, with their images.
        batch_size: Inputs at once.
        num_workers: Worker processes.

    Raises:
        ValueError: An embedding is not finite.
    """
    view = pairs.evaluation()
    text_image_id = pairs.text_image_id[:num_texts].to(module.device)
    encoded: dict[str, tuple[Tensor, Tensor]] = {}
    with _in_eval_mode(module), torch.no_grad(), trainer.precision_plugin.forward_context():
        for kind, load, number in (
            ("image", view.load_image, int(text_image_id.max()) + 1),
            ("text", view.load_text, num_texts),
        ):
            options: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers}
            if kind == "image" and isinstance(view, ShardDataset) and not view.is_local:
                loader = _stream(trainer, view, **options)
                number = len(view.images)
            else:
                loader = _loader(trainer, EvaluationItems(load, number), number, **options)
            encoded[kind] = _encode(trainer, module, kind, loader, number)
    (image, image_is_valid), (text, text_is_valid) = encoded["image"], encoded["text"]
    return EncodedPairs(image, text, text_image_id, image_is_valid, text_is_valid)


class EvaluationItems(Dataset[tuple[Any, int, bool]]):
    """All images, or all texts, by number; an unreadable one is stood in for by another, and said to be invalid."""

    def __init__(self, load: Callable[[int], Any], number: int) -> None:
        self.load, self.number = load, number

    def __getitem__(self, index: int) -> tuple[Any, int, bool]:
        for other in range(index, index + self.number):
            try:
                return self.load(other % self.number), index, other == index
            except UnreadablePairError:
                continue
        raise UnreadablePairError(f"None of the {self.number} inputs can be read. Is the path of the images right?")


def _loader(trainer: L.Trainer, items: EvaluationItems, number: int, **options: Any) -> DataLoader[Any]:
    share = -(-number // trainer.world_size)  # every rank as many: the last ones may come twice
    mine = [min(place * trainer.world_size + trainer.global_rank, number - 1) for place in range(share)]
    return DataLoader(items, sampler=mine, **_options(), **options)


def _stream(trainer: L.Trainer, pairs: ShardDataset, **options: Any) -> DataLoader[Any]:
    images = StreamedImages(pairs, rank=trainer.global_rank, world_size=trainer.world_size)
    return DataLoader(images, **_options(), **options)


def _options() -> dict[str, Any]:
    return {
        "collate_fn": collate_items,
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator(),  # of its own: no number is drawn from the streams of the run
    }


def collate_items(items: list[tuple[Any, int, bool]]) -> tuple[Any, Tensor, Tensor]:
    """Stack items into inputs, numbers and validity."""
    inputs, index, is_valid = zip(*items, strict=True)
    padded = pad_if_ragged(inputs)
    return (
        default_collate(list(inputs)) if padded is None else padded,
        torch.tensor(index),
        torch.tensor(is_valid),
    )


def _encode(trainer: L.Trainer, module: Any, kind: str, loader: DataLoader[Any], number: int) -> tuple[Tensor, Tensor]:
    encode = getattr(module, f"encode_{kind}")
    vectors, places, valid = [], [], []
    for inputs, index, is_valid in tqdm(
        loader, f"Mining: {kind}s", leave=False, disable=not is_progress_shown(trainer)
    ):
        # All at once, and before encoding: from pinned memory, and the host goes on to the next batch.
        inputs = trainer.precision_plugin.convert_input(inputs)
        inputs, index, is_valid = move_data_to_device((inputs, index, is_valid), module.device)
        vectors.append(unit_norm(encode(inputs)).float())
        places.append(index)
        valid.append(is_valid)
    place = gather(torch.cat(places))
    everything = [
        part.new_zeros(number, *part.shape[1:]).index_copy_(0, place, part)
        for part in (gather(torch.cat(parts)) for parts in (vectors, valid))
    ]
    if not bool(everything[0].isfinite().all()):
        raise ValueError(
            f"Expected finite {kind} embeddings when mining on rank {trainer.global_rank}, epoch {trainer.current_epoch}, "
            "got NaN or infinity. The earlier table is kept; lower the learning rate, or clip gradients."
        )
    return everything[0], everything[1]


def is_progress_shown(trainer: L.Trainer) -> bool:
    """Return whether this process has the Trainer's progress bar."""
    return trainer.progress_bar_callback is not None and trainer.is_global_zero


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, flag in flags:
            part.training = flag
