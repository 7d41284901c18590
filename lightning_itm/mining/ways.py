"""Which ways of encoding and of using what was mined go together."""

from typing import Any

from lightning_itm.checks import check_choice
from lightning_itm.mining.injection import INJECTIONS
from lightning_itm.mining.search.faiss_index import check_index


def check_ways(inject: str, encode: str) -> None:
    """Raise a ValueError if what was mined can't reach the steps in this way, or the embeddings can't be had so."""
    check_choice("inject", inject, tuple(INJECTIONS))
    check_choice("encode", encode, ("pass", "training"))
    if (inject, encode) == ("embeddings", "training"):
        raise ValueError(
            "Expected `encode='pass'` with `inject='embeddings'`, got 'training': a pair that training has not seen yet "
            "has no embedding to draw. Use `inject='batches'`, which needs none."
        )


def check_split(inject: str, encode: str, table: Any) -> None:
    """Raise a ValueError if embeddings that are split over the ranks can't be used so.

    Args:
        inject: How what was mined reaches the steps.
        encode: How the embeddings are had.
        table: The folder of a table that was mined before, or ``None``.
    """
    if inject == "embeddings":
        raise ValueError(
            "Expected `split_embeddings=False` with `inject='embeddings'`, got True: a step draws from the embeddings of the "
            "whole set, so each rank needs all of them. Use `inject='batches'` or `'samples'`, which need none."
        )
    if encode == "training":
        raise ValueError(
            "Expected `split_embeddings=False` with `encode='training'`, got True: each rank keeps the embeddings of all "
            "pairs that were trained. Use `encode='pass'`, where each rank encodes and keeps its own part."
        )
    if table is not None:
        raise ValueError("Expected no `split_embeddings` with `table`, which needs no embeddings. Leave one out.")


def check_search(search: str, faiss_index: str | None, *, split_embeddings: bool = False) -> None:
    """Raise if a set can't be searched so.

    Args:
        search: How the negatives are found.
        faiss_index: The index that is named, or ``None``.
        split_embeddings: Whether each rank keeps the embeddings of its own part alone.

    Raises:
        ValueError: if the options do not go together, or FAISS has no such index.
        ImportError: if FAISS is needed and not installed.
    """
    check_choice("search", search, ("exact", "faiss"))
    if search == "exact":
        if faiss_index is not None:
            raise ValueError(
                f"Expected `search='faiss'` with `faiss_index`, got 'exact' and {faiss_index!r}. Give `search='faiss'`, or "
                "leave `faiss_index` out."
            )
        return
    if split_embeddings:
        raise ValueError(
            "Expected `split_embeddings=False` with `search='faiss'`, got True: each rank has an index of the whole set. "
            "Use `search='exact'`, which works with parts."
        )
    check_index(faiss_index)
