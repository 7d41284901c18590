"""Write the negatives of a whole set to files, for use anywhere."""

from pathlib import Path
from typing import Any, Literal

import lightning as L
from torch import Tensor

from lightning_itm.callbacks._rows import negative_files, write_negatives
from lightning_itm.callbacks.embedding_writer import EmbeddingWriter
from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.mining.encode import part_of
from lightning_itm.mining.encoded import EncodedPairs
from lightning_itm.mining.search import find_negatives
from lightning_itm.mining.ways import check_search


class NegativeWriter(EmbeddingWriter):
    """Write the hardest texts of every image and the hardest images of every text, with their similarities.

    The files ``texts_of_images`` and ``images_of_texts`` have one row per image, or per text, with a list of what was mined
    for it, the hardest first. They hold what :class:`~lightning_itm.OfflineHardNegativeMining` draws from.

    Args:
        folder: Where the files are written. It is made, and must not hold results already.
        texts_per_image: Most texts that are kept per image.
        images_per_text: Most images that are kept per text.
        format: ``"jsonl"``, which any program reads, or ``"parquet"``, which is smaller and needs pyarrow.
        search: ``"exact"``, or ``"faiss"``, where the exact search takes too long.
        faiss_index: The index of FAISS, as :class:`~lightning_itm.OfflineHardNegativeMining` takes it. The default is fine.
        **guards: ``rank_min``, ``max_score``, ``absolute_margin`` and ``relative_margin``, as
            :func:`~lightning_itm.functional.top_k_negatives` takes them. They leave out likely false negatives.

    Raises:
        ValueError: if ``format`` is neither of the two, or FAISS has no such index.
        ImportError: if pyarrow or FAISS is needed and not installed.
    """

    consequence = "They are left out as negatives, and so are the texts of such an image."

    def __init__(
        self,
        folder: str | Path,
        texts_per_image: int = 300,
        images_per_text: int = 60,
        *,
        format: Literal["jsonl", "parquet"] = "jsonl",
        search: Literal["exact", "faiss"] = "exact",
        faiss_index: str | None = None,
        **guards: Any,
    ) -> None:
        super().__init__(folder)
        check_search(search, faiss_index)
        self.texts_per_image, self.images_per_text = texts_per_image, images_per_text
        self.format, self.guards = format, guards
        self.searching = {"search": search, "faiss_index": faiss_index}
        self.results = negative_files(format)

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
        options = {**part_of(trainer), **self.searching, **self.guards}
        mined = find_negatives(encoded, self.texts_per_image, self.images_per_text, **options)
        if trainer.is_global_zero:  # after the search, which gathers from every rank
            write_negatives(self.folder, pairs, mined, self.format)
