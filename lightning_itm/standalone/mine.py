"""Mine a set with any model, in a process without a Trainer."""

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_itm.callbacks._rows import check_no_results, negative_files, write_negatives
from lightning_itm.checks import check_at_least
from lightning_itm.data.pairs import ImageTextDataset
from lightning_itm.mining.encode import encode_pairs, encode_split_pairs, part_of
from lightning_itm.mining.encoded import ReadablePairs, SplitPairs
from lightning_itm.mining.hard_negative_dataset import pairs_to_mine
from lightning_itm.mining.search import MinedNegatives, find_negatives, find_split_negatives
from lightning_itm.mining.ways import check_search
from lightning_itm.randomness import random_streams_kept
from lightning_itm.standalone.encoders import Encoders, PrecisionName, WithoutTrainer, plugin_of


def mine(
    model: Any,
    dataset: ImageTextDataset,
    *,
    texts_per_image: int = 300,
    images_per_text: int = 60,
    rank_min: int = 0,
    max_score: float | None = None,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    device: str | torch.device | None = None,
    precision: PrecisionName = "32-true",
    batch_size: int = 256,
    num_workers: int = 0,
    split_embeddings: bool = False,
    search: Literal["exact", "faiss"] = "exact",
    faiss_index: str | None = None,
    output: str | PathLike[str] | None = None,
    format: Literal["jsonl", "parquet"] = "jsonl",
    show_progress: bool = False,
) -> MinedNegatives:
    """Find the hardest texts of every image and the hardest images of every text of a set, without a Trainer.

    In plain terms: each image and each text is encoded once, with evaluation transforms and without gradient. Then each is
    compared with all of the other kind. The result is that of :class:`~lightning_itm.OfflineHardNegativeMining` and of
    ``lightning-itm mine`` with the same weights. Train with it through :class:`~lightning_itm.HardNegativeDataset`:
    ``hard.table.publish(mined.texts, mined.images)``.

    The modules of the model are in eval mode meanwhile. Afterwards their modes and the random streams are as before. Where a
    process group is initialised, the ranks share the work. Each of them must call this function, and gets the whole result.

    Args:
        model: A :class:`~lightning_itm.DualEncoder`, any other object with ``encode_image`` and ``encode_text``, or a pair of
            functions ``(images, texts)``, such as the ``encode`` of two models of sentence-transformers. Each takes a batch of
            ``dataset`` and returns a tensor or an array `(batch, dim)` of any norm. A function that calls a module may hide
            it: only of modules and of their methods the mode is set. Call ``eval()`` first where it is another function.
        dataset: The set. Without a ``tokenizer`` it gives lists of strings, and with ``transform=lambda image: image`` lists
            of PIL images, for models that prepare their own inputs.
        texts_per_image: Most texts that are kept per image. Fewer are harder, and more often wrongly taken as negatives.
        images_per_text: Most images that are kept per text.
        rank_min: Leave out this many of the hardest, which are the likeliest false negatives. Typical: 0 to 10. This and the
            next three are not in the paper. They work as in :func:`~lightning_itm.functional.top_k_negatives`.
        max_score: Drop negatives that are more similar than this. Default: keep all.
        absolute_margin: Drop negatives that are more similar than the positive minus this. Default: keep all.
        relative_margin: Drop negatives above the positive less this fraction of its absolute value. Default: keep all.
        device: Where the inputs are moved to, such as ``"cuda"``. The model must be there. Default: where its weights are, or
            the CPU for functions without a module.
        precision: A precision of Lightning's Trainer. ``"bf16-mixed"`` encodes under autocast. Use ``"bf16-true"`` for a model
            whose weights are bfloat16.
        batch_size: Inputs that are encoded at once. No gradient is kept, so it can be larger than in training.
        num_workers: Worker processes that load the inputs. 0: the process itself.
        split_embeddings: Let each process keep only the embeddings of its own part of the set, in half precision. Typical:
            False. Turn it on where several processes mine a set whose embeddings do not fit on one device. The search is exact
            for the rounded embeddings. Not in the paper.
        search: ``"exact"``, or ``"faiss"`` for sets where that takes too long: candidates come from an index of FAISS (extra
            ``[faiss]``), and are then compared exactly. Not in the paper.
        faiss_index: The index, as :class:`~lightning_itm.OfflineHardNegativeMining` takes it, such as
            ``"IVF4096,PQ64x4fs nprobe=64"``. Default: one that fits the number of keys.
        output: The folder for the files ``texts_of_images`` and ``images_of_texts``, which it must not hold already. Default:
            nothing is written. See :class:`~lightning_itm.NegativeWriter`.
        format: The form of the files: ``"jsonl"``, or ``"parquet"``, which is smaller and needs pyarrow.
        show_progress: Show progress bars.

    Returns:
        The ids and the similarities of what was mined, on the CPU, the hardest first. ``recall`` says which fraction of the
        exact search's result an index found.

    Raises:
        TypeError: if the model is none of these, or returns neither tensors nor arrays.
        ImportError: if FAISS is needed and not installed.
        ValueError: if an argument is out of its range, if FAISS has no such index, if what the model returns does not fit the
            batch, or is not finite, or if the weights are not on ``device``.
        FileExistsError: if ``output`` holds such files already.
        MisconfigurationException: if ``dataset`` holds no pairs, or fewer than two images.

    Example:
        >>> import torch
        >>> from PIL import Image
        >>> from lightning_itm import ImageTextDataset, mine
        >>> pairs = ImageTextDataset([Image.new("RGB", (2, 2), name) for name in ("red", "blue")], ["red", "blue"])
        >>> encode_text = lambda texts: torch.tensor([[text == "red", 0, text == "blue"] for text in texts]).float()
        >>> mine((lambda images: images.mean(dim=(2, 3)), encode_text), pairs, texts_per_image=1, images_per_text=1).texts
        tensor([[1],
                [0]], dtype=torch.int32)

    References:
        *Adaptive Offline Quintuplet Loss for Image-Text Matching*, ECCV 2020, arXiv 2003.03669.
    """
    check_at_least(1, texts_per_image=texts_per_image, images_per_text=images_per_text, batch_size=batch_size)
    check_at_least(0, rank_min=rank_min, num_workers=num_workers)
    check_search(search, faiss_index, split_embeddings=split_embeddings)
    folder = None if output is None else Path(output)
    if folder is not None:
        check_no_results(folder, negative_files(format))
    pairs, encoders = pairs_to_mine(dataset, None), Encoders(model, device)
    runner = WithoutTrainer(plugin_of(precision, encoders.device), True if show_progress else None)
    guards: dict[str, Any] = {"rank_min": rank_min, "max_score": max_score}
    guards |= {"absolute_margin": absolute_margin, "relative_margin": relative_margin}
    loading = {"batch_size": batch_size, "num_workers": num_workers}
    with random_streams_kept():
        encode = encode_split_pairs if split_embeddings else encode_pairs
        encoded = encode(runner, encoders, pairs, len(pairs), **loading)
    _warn_of_unreadable(encoded)
    counts, options = (
        (texts_per_image, images_per_text),
        {**part_of(runner), "search": search, "faiss_index": faiss_index, **guards},
    )
    if isinstance(encoded, SplitPairs):
        mined = find_split_negatives(encoded, *counts, **options)
    else:
        mined = _on_cpu(find_negatives(encoded, *counts, **options))
    if folder is not None and runner.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        write_negatives(folder, pairs, mined, format)
    return mined


def _warn_of_unreadable(encoded: ReadablePairs) -> None:
    left_out = {"images": encoded.image_is_valid, "texts": encoded.text_is_valid}
    counts = [f"{int((~valid).sum())} of {len(valid)} {kind}" for kind, valid in left_out.items()]
    if not all(bool(valid.all()) for valid in left_out.values()):
        rank_zero_warn(
            f"{' and '.join(counts)} are left out as negatives: they, or what belongs to them, can't be read."
        )


def _on_cpu(mined: MinedNegatives) -> MinedNegatives:
    return replace(
        mined,
        texts=mined.texts.int().cpu(),  # int32, as in the table of a callback
        images=mined.images.int().cpu(),
        text_scores=mined.text_scores.cpu(),
        image_scores=mined.image_scores.cpu(),
    )
