"""One pass over a training set: encode everything once, find the hardest negatives, draw from them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm

from lightning_itm.data.batch import HardNegatives
from lightning_itm.data.padded import pad_if_ragged
from lightning_itm.data.pairs import ImageTextPairs, UnreadablePairError
from lightning_itm.data.shards import ShardPairs
from lightning_itm.data.streamed import StreamedImages
from lightning_itm.distributed import gather
from lightning_itm.functional.draws import uniform
from lightning_itm.functional.similarity import unit_norm
from lightning_itm.functional.top_k import TopK, score_ceiling, top_k_negatives

NUM_SAMPLED_ANCHORS = 256
ANCHORS_AT_ONCE = 16_384  # between two ticks of the progress bar


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


@dataclass
class FoundNegatives:
    """What a search found: rows of texts for each image, of images for each text, and how hard they are."""

    texts: Tensor
    images: Tensor
    text_scores: Tensor
    image_scores: Tensor
    gap: float
    rejected_share: float


def encode_pairs(
    trainer: L.Trainer, module: Any, pairs: ImageTextPairs, num_texts: int, *, batch_size: int, num_workers: int
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
            if kind == "image" and isinstance(view, ShardPairs) and not view.is_local:
                loader = _stream(trainer, view, **options)
                number = len(view.images)
            else:
                loader = _loader(trainer, _Items(load, number), number, **options)
            encoded[kind] = _encode(trainer, module, kind, loader, number)
    (image, image_is_valid), (text, text_is_valid) = encoded["image"], encoded["text"]
    return EncodedPairs(image, text, text_image_id, image_is_valid, text_is_valid)


def find_negatives(
    pairs: EncodedPairs,
    num_texts: int,
    num_images: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    is_shown: bool = False,
    **guards: Any,
) -> FoundNegatives:
    """Search the hardest texts of every image and the hardest images of every text, each rank its share of the anchors.

    Args:
        pairs: All embeddings.
        num_texts: Texts kept for an image.
        num_images: Images kept for a text.
        rank: This rank.
        world_size: Number of ranks.
        is_shown: Draw a progress bar.
        **guards: Of :func:`~lightning_itm.functional.top_k_negatives`.
    """
    image_id = torch.arange(len(pairs.image), device=pairs.image.device)
    of_image, of_text = pairs.positive()
    split = {"rank": rank, "world_size": world_size, "is_shown": is_shown, **guards}
    texts, rejected_texts = _search(
        pairs.image, pairs.text, pairs.text_is_valid, image_id, pairs.text_image_id, of_image, num_texts, **split
    )
    images, rejected_images = _search(
        pairs.text, pairs.image, pairs.image_is_valid, pairs.text_image_id, image_id, of_text, num_images, **split
    )
    gap = torch.cat([of_image - texts.scores[:, 0], of_text - images.scores[:, 0]])
    gap = gap[gap.isfinite()]
    rejected = (rejected_texts + rejected_images) / 2
    return FoundNegatives(texts.index, images.index, texts.scores, images.scores, float(gap.mean()), rejected)


class EmbeddedNegatives:
    """Negatives as embeddings of the mining pass, drawn on the device: a draw is a function of (seed, epoch, text id).

    Args:
        image: `(images, dim)`, unit-norm.
        text: `(texts, dim)`, unit-norm.
        texts: The hardest texts of each image, −1 where there is none.
        images: The hardest images of each text, likewise.
        text_image_id: The image of each text.
        coupled_ranks: One draw for both.
        seed: Of the draws.
    """

    def __init__(
        self,
        image: Tensor,
        text: Tensor,
        texts: Tensor,
        images: Tensor,
        text_image_id: Tensor,
        *,
        coupled_ranks: bool = True,
        seed: int = 0,
    ) -> None:
        device = image.device
        self.image, self.text = image, text
        self.texts, self.images = texts.to(device), images.to(device)
        self.text_image_id = text_image_id.to(device)
        self.order = self.text_image_id.argsort(stable=True)
        self.count = torch.bincount(self.text_image_id, minlength=len(image))
        self.start = self.count.cumsum(0) - self.count
        self.coupled_ranks, self.seed = coupled_ranks, seed

    def draw(self, image_id: Tensor, text_id: Tensor, epoch: int) -> HardNegatives:
        """Draw a text and an image for each pair of a batch; the host waits for nothing."""
        texts, images = self.texts[image_id], self.images[text_id]
        num_texts, num_images = (texts >= 0).sum(dim=1), (images >= 0).sum(dim=1)
        first, second, third = (uniform(text_id, self.seed, epoch, number) for number in range(3))
        place = (first * num_texts).long()
        if self.coupled_ranks:
            image_place = torch.minimum(place * images.shape[1] // texts.shape[1], num_images - 1)
        else:
            image_place = (second * num_images).long()
        hard_text = texts.gather(1, place[:, None]).squeeze(1).long()
        hard_image = images.gather(1, image_place.clamp_min(0)[:, None]).squeeze(1).long()
        text_there, image_there = hard_text >= 0, hard_image >= 0
        hard_text, hard_image = hard_text.clamp_min(0), hard_image.clamp_min(0)
        of_text = self.text_image_id[hard_text]
        of_image = self.order[self.start[hard_image] + (third * self.count[hard_image]).long()]
        return HardNegatives(
            text=self.text[hard_text],
            text_image=self.image[of_text],
            text_image_id=torch.where(text_there, of_text, -1),
            image=self.image[hard_image],
            image_text=self.text[of_image],
            image_id=torch.where(image_there, hard_image, -1),
        )


class _Items(Dataset[tuple[Any, int, bool]]):
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


def _loader(trainer: L.Trainer, items: _Items, number: int, **options: Any) -> DataLoader[Any]:
    share = -(-number // trainer.world_size)  # every rank as many: the last ones may come twice
    mine = [min(place * trainer.world_size + trainer.global_rank, number - 1) for place in range(share)]
    return DataLoader(items, sampler=mine, **_options(), **options)


def _stream(trainer: L.Trainer, pairs: ShardPairs, **options: Any) -> DataLoader[Any]:
    images = StreamedImages(pairs, rank=trainer.global_rank, world_size=trainer.world_size)
    return DataLoader(images, **_options(), **options)


def _options() -> dict[str, Any]:
    return {
        "collate_fn": _collate,
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator(),  # of its own: no number is drawn from the streams of the run
    }


def _collate(items: list[tuple[Any, int, bool]]) -> tuple[Any, Tensor, Tensor]:
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


def _search(
    anchors: Tensor,
    keys: Tensor,
    key_is_valid: Tensor,
    anchor_id: Tensor,
    key_id: Tensor,
    positive: Tensor,
    k: int,
    *,
    rank: int,
    world_size: int,
    is_shown: bool,
    **guards: Any,
) -> tuple[TopK, float]:
    kept = key_is_valid.nonzero().squeeze(1)
    keys, key_id = keys[kept], key_id[kept]
    share = -(-len(anchors) // world_size)
    mine = (torch.arange(share, device=anchors.device) + rank * share).clamp_max(len(anchors) - 1)
    found = [
        top_k_negatives(
            anchors[rows], keys, k, anchor_id=anchor_id[rows], key_id=key_id, positive=positive[rows], **guards
        )
        for rows in tqdm(mine.split(ANCHORS_AT_ONCE), "Mining: search", leave=False, disable=not is_shown)
    ]
    scores, index = (gather(torch.cat(parts))[: len(anchors)] for parts in zip(*found, strict=True))
    index = torch.where(index < 0, -1, kept[index.clamp_min(0)])
    return TopK(scores, index), _rejected_share(anchors, keys, anchor_id, key_id, positive, k, **guards)


def _rejected_share(
    anchors: Tensor, keys: Tensor, anchor_id: Tensor, key_id: Tensor, positive: Tensor, k: int, **guards: Any
) -> float:
    """Measure, on some anchors, the share of the hardest ``k`` that the guards reject."""
    rank_min = guards.pop("rank_min", 0)
    some = slice(None, None, max(1, len(anchors) // NUM_SAMPLED_ANCHORS))
    ceiling = score_ceiling(positive[some], **guards)
    if ceiling is None and rank_min == 0:
        return 0.0
    free = top_k_negatives(anchors[some], keys, k, anchor_id=anchor_id[some], key_id=key_id).scores
    there = free.isfinite()
    rejected = torch.zeros_like(there) if ceiling is None else free > ceiling.expand(len(free))[:, None]
    skipped = (there & ~rejected).sum(dim=1).clamp_max(rank_min)
    return float(((rejected & there).sum() + skipped.sum()) / there.sum().clamp_min(1))


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


def padded_rows(index: Tensor, rows: int) -> Tensor:
    """Return int32 on the CPU, with rows of −1 for anchors that were not searched."""
    return pad(index.int().cpu(), (0, 0, 0, rows - len(index)), value=-1)
