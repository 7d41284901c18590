"""Encode a set, search it, and publish what was mined."""

import time
from typing import Any

import lightning as L

from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.mining.encode import EncodedPairs, encode_pairs, part_of
from lightning_itm.mining.negative_table import NegativeTable
from lightning_itm.mining.search import find_negatives, padded_rows

FAST_DEV_RUN_PAIRS = 512


def mine_into(
    table: NegativeTable,
    pairs: ImageTextDataset,
    trainer: L.Trainer,
    module: L.LightningModule,
    *,
    batch_size: int,
    num_workers: int | None,
    **guards: Any,
) -> tuple[EncodedPairs, dict[str, float]]:
    """Mine the negatives of a set with a model as it stands, and publish them. Every rank must call it.

    Args:
        table: Where the negatives are written. It says how many are kept, too. If mining fails, it stays as it was.
        pairs: The set. With ``fast_dev_run``, its first 512 texts and their images are enough.
        trainer: The Trainer, whose ranks share the work.
        module: The :class:`~lightning_itm.DualEncoder` that encodes.
        batch_size: Inputs that are encoded at once, such as 256.
        num_workers: Worker processes that load the inputs. ``None``: as many as the datamodule has.
        **guards: As :func:`find_negatives` takes them.

    Returns:
        The embeddings, and what can be logged: seconds, gap, and fractions.

    Raises:
        ValueError: if an embedding is not finite.
    """
    num_texts = min(len(pairs), FAST_DEV_RUN_PAIRS) if trainer.fast_dev_run else len(pairs)  # type: ignore[attr-defined]
    of_datamodule = getattr(trainer.datamodule, "num_workers", 0)  # type: ignore[attr-defined]
    options = {"batch_size": batch_size, "num_workers": of_datamodule if num_workers is None else num_workers}
    start = time.perf_counter()
    encoded = encode_pairs(trainer, module, pairs, num_texts, **options)
    between = time.perf_counter()
    (num_images, texts_per_image), (num_all_texts, images_per_text) = table.shapes
    mined = find_negatives(encoded, texts_per_image, images_per_text, **part_of(trainer), **guards)
    texts, images = padded_rows(mined.texts, num_images), padded_rows(mined.images, num_all_texts)
    # Before the table is written: each place is compared with what stood there.
    num_changed = int((texts != table.texts).sum()) + int((images != table.images).sum())
    table.publish(texts, images)
    return encoded, {
        "mining/encode_seconds": between - start,
        "mining/search_seconds": time.perf_counter() - between,
        "mining/gap": mined.gap,
        "mining/rejected_share": mined.rejected_fraction,
        "mining/changed_share": num_changed / (texts.numel() + images.numel()),
    }


def check_at_least(least: int, **counts: int | None) -> None:
    """Raise a ValueError that names the first count below ``least``. ``None`` passes."""
    for name, value in counts.items():
        if value is not None and value < least:
            raise ValueError(f"Expected `{name}` to be at least {least}, got {value}.")
