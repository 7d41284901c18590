"""Write the negatives of a whole set to files, for use anywhere."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import lightning as L
from torch import Tensor

from lightning_itm.callbacks._rows import (
    describe_image,
    describe_text,
    pyarrow,
    whole_files,
    write_jsonl,
    write_parquet,
)
from lightning_itm.callbacks.embedding_writer import EmbeddingWriter
from lightning_itm.checks import check_choice
from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.mining.encode import EncodedPairs, part_of
from lightning_itm.mining.search import find_negatives


class NegativeWriter(EmbeddingWriter):
    """Write the hardest texts of every image and the hardest images of every text, with their similarities.

    The files ``texts_of_images`` and ``images_of_texts`` have one row per image, or per text, with a list of what was mined
    for it, the hardest first. They hold what :class:`~lightning_itm.OfflineHardNegativeMining` draws from.

    Args:
        folder: Where the files are written. It is made, and must not hold results already.
        texts_per_image: Most texts that are kept per image.
        images_per_text: Most images that are kept per text.
        format: ``"jsonl"``, which any program reads, or ``"parquet"``, which is smaller and needs pyarrow.
        **guards: ``rank_min``, ``max_score``, ``absolute_margin`` and ``relative_margin``, as
            :func:`~lightning_itm.functional.top_k_negatives` takes them. They leave out likely false negatives.

    Raises:
        ValueError: if ``format`` is neither of the two.
        ModuleNotFoundError: if pyarrow is needed and not installed.
    """

    consequence = "They are left out as negatives, and so are the texts of such an image."

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
        check_choice("format", format, ("jsonl", "parquet"))
        if format == "parquet":
            pyarrow()  # before anything is encoded
        self.texts_per_image, self.images_per_text = texts_per_image, images_per_text
        self.format, self.guards = format, guards
        self.results = tuple(f"{name}.{format}" for name in ("texts_of_images", "images_of_texts"))

    def write(
        self,
        trainer: L.Trainer,
        pairs: ImageTextDataset,
        image_embeddings: Tensor,
        image_is_valid: Tensor,
        text_embeddings: Tensor,
        text_is_valid: Tensor,
    ) -> None:
        """Search, with all ranks, and write what was mined."""
        text_image_id = pairs.text_image_id.to(image_embeddings.device)
        caption_id = None if pairs.caption_id is None else pairs.caption_id.to(image_embeddings.device)
        valid = image_is_valid, text_is_valid
        encoded = EncodedPairs(image_embeddings, text_embeddings, text_image_id, *valid, caption_id)
        options = {**part_of(trainer), **self.guards}
        mined = find_negatives(encoded, self.texts_per_image, self.images_per_text, **options)
        if not trainer.is_global_zero:
            return  # after the search, which gathers from every rank
        put = write_jsonl if self.format == "jsonl" else write_parquet
        with whole_files(self.folder, self.results) as part:
            put(part / self.results[0], _rows(pairs, "image", "text", mined.texts, mined.text_scores))
            put(part / self.results[1], _rows(pairs, "text", "image", mined.images, mined.image_scores))


DESCRIBE = {"image": describe_image, "text": describe_text}


def _rows(
    pairs: ImageTextDataset, anchor: str, negative: str, index: Tensor, scores: Tensor
) -> Iterator[dict[str, Any]]:
    # One by one: all rows at once, 300 dicts in each, would take many times the memory of the two tensors.
    for anchor_id, (ids, values) in enumerate(zip(index.cpu(), scores.float().cpu(), strict=True)):
        hardest = [
            {**DESCRIBE[negative](pairs, negative_id), "score": round(score, 6)}
            for negative_id, score in zip(ids.tolist(), values.tolist(), strict=True)
            if negative_id >= 0
        ]
        yield {**DESCRIBE[anchor](pairs, anchor_id), f"{negative}s": hardest}
