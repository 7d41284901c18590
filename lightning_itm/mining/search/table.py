"""Search, and put what was found into a table or into tensors."""

from typing import Any

import torch

from lightning_itm.functional import TopK
from lightning_itm.mining.encoded import EncodedPairs, SplitPairs
from lightning_itm.mining.negative_table import NegativeTable
from lightning_itm.mining.search.split import search_split_pairs
from lightning_itm.mining.search.whole import MinedNegatives, find_negatives, padded_rows


def fill_table(table: NegativeTable, encoded: EncodedPairs | SplitPairs, **options: Any) -> dict[str, float]:
    """Search the negatives of a set, and publish them. Every rank must call it.

    Args:
        table: Where the negatives are written. It says how many are kept, too.
        encoded: The embeddings. Where these are split, the table is written part by part, and nothing as large is held beside.
        **options: Those of :func:`~lightning_itm.mining.find_negatives`.

    Returns:
        What can be logged. The recall is there where an index was searched.
    """
    recall: dict[str, float] = {}
    (num_images, texts_per_image), (num_texts, images_per_text) = table.shapes
    if isinstance(encoded, SplitPairs):
        gap, rejected, num_changed = _fill_by_parts(table, encoded, **options)
    else:
        mined = find_negatives(encoded, texts_per_image, images_per_text, **options)
        texts, images = padded_rows(mined.texts, num_images), padded_rows(mined.images, num_texts)
        # Before the table is written: each place is compared with what stood there.
        num_changed = int((texts != table.texts).sum()) + int((images != table.images).sum())
        table.publish(texts, images)
        gap, rejected = mined.gap, mined.rejected_fraction
        recall = {"mining/recall": mined.recall} if options.get("search") == "faiss" else {}
    return {
        "mining/gap": gap,
        "mining/rejected_share": rejected,
        "mining/changed_share": num_changed / (table.texts.numel() + table.images.numel()),
        **recall,
    }


def _fill_by_parts(table: NegativeTable, encoded: SplitPairs, **options: Any) -> tuple[float, float, int]:
    num_changed = 0
    places = {"texts": table.texts, "images": table.images}

    def write(name: str, rows: slice, index: torch.Tensor | int) -> None:
        nonlocal num_changed
        num_changed += int((places[name][rows] != index).sum())
        places[name][rows] = index

    measured = search_split_pairs(
        encoded,
        table.texts.shape[1],
        table.images.shape[1],
        lambda name, rows, found: write(name, rows, found.index.cpu()),
        **_without_whole(options),
    )
    for name, num_searched in (("texts", len(encoded.image_is_valid)), ("images", len(encoded.text_is_valid))):
        write(name, slice(num_searched, None), -1)  # a trial run searches fewer
    table.is_pending = False  # last: a worker that sees it finds all entries there
    return *measured, num_changed


def find_split_negatives(
    encoded: SplitPairs, texts_per_image: int, images_per_text: int, **options: Any
) -> MinedNegatives:
    """Search as :func:`~lightning_itm.mining.find_negatives` does. Every rank gets all of it, on the CPU, ids as int32."""
    num_images, num_texts = len(encoded.image_is_valid), len(encoded.text_is_valid)
    shapes = {"texts": (num_images, texts_per_image), "images": (num_texts, images_per_text)}
    index = {name: torch.empty(shape, dtype=torch.int32) for name, shape in shapes.items()}
    scores = {name: torch.empty(shape) for name, shape in shapes.items()}

    def write(name: str, rows: slice, found: TopK) -> None:
        index[name][rows], scores[name][rows] = found.index.cpu(), found.scores.cpu()

    counts = texts_per_image, images_per_text
    gap, rejected = search_split_pairs(encoded, *counts, write, with_scores=True, **_without_whole(options))
    return MinedNegatives(index["texts"], index["images"], scores["texts"], scores["images"], gap, rejected)


def _without_whole(options: dict[str, Any]) -> dict[str, Any]:
    # Split embeddings know their ranks, and have no index.
    whole = "rank", "world_size", "search", "faiss_index"
    return {name: value for name, value in options.items() if name not in whole}
