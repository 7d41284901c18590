"""Negatives mined over a whole set, in files, for use anywhere."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import lightning as L
from torch import Tensor

from lightning_itm.callbacks._rows import describe_image, describe_text, pyarrow, write_jsonl, write_parquet
from lightning_itm.callbacks.embedding_writer import EmbeddingWriter
from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.mining.encode import EncodedPairs, is_progress_shown
from lightning_itm.mining.search import find_negatives


class NegativeWriter(EmbeddingWriter):
    """Write the hardest texts of every image and the hardest images of every text, with their similarities.

    ``texts_of_images`` and ``images_of_texts``, as ``.jsonl`` or ``.parquet``: one row an image, or a text, with a list of
    what was mined for it, the hardest first. They are what :class:`~lightning_itm.OfflineHardNegativeMining` draws from.

    Args:
        folder: Where to; it must not hold results already.
        texts_per_image: Texts kept for an image.
        images_per_text: Images kept for a text.
        format: ``"jsonl"`` or ``"parquet"``, which needs pyarrow.
        **guards: Of :func:`~lightning_itm.functional.top_k_negatives`.

    Raises:
        ValueError: Another format.
    """

    consequence = "They are nobody's negative, nor are the texts of such an image."

    def __init__(
        self,
        folder: str | Path,
        texts_per_image: int = 300,
        images_per_text: int = 60,
        *,
        format: Literal["jsonl", "parquet"] = "jsonl",
        **guards: Any,
    ) -> None:
        super().__init__(folder)
        if format not in ("jsonl", "parquet"):
            raise ValueError(f"Expected `format` to be 'jsonl' or 'parquet', got {format!r}.")
        if format == "parquet":
            pyarrow()  # before anything is encoded
        self.texts_per_image, self.images_per_text, self.format, self.guards = (
            texts_per_image,
            images_per_text,
            format,
            guards,
        )
        self.results = tuple(f"{name}.{format}" for name in ("texts_of_images", "images_of_texts"))

    def write(
        self,
        trainer: L.Trainer,
        pairs: ImageTextDataset,
        image: Tensor,
        image_is_valid: Tensor,
        text: Tensor,
        text_is_valid: Tensor,
    ) -> None:
        """Search, each rank its share, and write what was found."""
        encoded = EncodedPairs(image, text, pairs.text_image_id.to(image.device), image_is_valid, text_is_valid)
        found = find_negatives(
            encoded,
            self.texts_per_image,
            self.images_per_text,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            is_shown=is_progress_shown(trainer),
            **self.guards,
        )
        if not trainer.is_global_zero:
            return
        put = write_jsonl if self.format == "jsonl" else write_parquet
        put(self.folder / self.results[0], _rows(pairs, "image", "text", found.texts, found.text_scores))
        put(self.folder / self.results[1], _rows(pairs, "text", "image", found.images, found.image_scores))


DESCRIBE = {"image": describe_image, "text": describe_text}


def _rows(pairs: ImageTextDataset, of: str, mined: str, index: Tensor, scores: Tensor) -> Iterator[dict[str, Any]]:
    for anchor, (numbers, values) in enumerate(zip(index.cpu(), scores.float().cpu(), strict=True)):
        hardest = [
            {**DESCRIBE[mined](pairs, number), "score": round(value, 6)}
            for number, value in zip(numbers.tolist(), values.tolist(), strict=True)
            if number >= 0
        ]
        yield {**DESCRIBE[of](pairs, anchor), f"{mined}s": hardest}
