"""The part of peers.py that searches: the k nearest keys, and the whole of mining."""

import contextlib
import io
import logging
import tempfile
from typing import Any

import torch
from peers_compare import DIM, Way, compare, print_versions, unit
from torch import Tensor
from torch.nn.functional import normalize

from lightning_itm.functional import top_k_negatives
from lightning_itm.mining import EncodedPairs, MinedNegatives, find_negatives

K, NUM_KEYS, NUM_ANCHORS, NUM_MINED = 60, 100_000, 1024, 4000
MARGIN = 0.05  # relative: a negative above 95 % of the positive's similarity is left out


def search(runs: int) -> None:
    """Search alone beside FAISS, and mining beside sentence-transformers."""
    try:
        import faiss
        import sentence_transformers  # noqa: F401  # only asked whether it is there
    except ImportError as error:
        raise SystemExit(
            'The part `search` needs its peers: pip install faiss-cpu "sentence-transformers[train]"'
        ) from error
    faiss.omp_set_num_threads(1)
    print_versions("faiss-cpu", "sentence-transformers")
    anchors, keys = unit(NUM_ANCHORS), unit(NUM_KEYS)
    index = faiss.IndexFlatIP(DIM)
    index.add(keys.numpy())
    peer = ("faiss.IndexFlatIP", lambda: index.search(anchors.numpy(), K))
    ways: dict[str, Way] = {"top_k_negatives": lambda: top_k_negatives(anchors, keys, K)}
    compare(f"Search, {NUM_ANCHORS:,} x {NUM_KEYS:,}, k {K}", peer, ways, runs)
    mining(max(3, runs // 3))


def mining(runs: int) -> None:
    """Mine both directions of as many pairs, and print how far both agree."""
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    thing = unit(NUM_MINED)
    image, text = (normalize(thing + 0.7 * unit(NUM_MINED), dim=1) for _ in range(2))
    ids, is_valid = torch.arange(NUM_MINED), torch.ones(NUM_MINED, dtype=torch.bool)
    pairs = EncodedPairs(image, text, ids, is_valid, is_valid)

    def ours() -> MinedNegatives:
        return find_negatives(pairs, K, K, relative_margin=MARGIN)

    with tempfile.TemporaryDirectory() as folder:
        theirs = Theirs(image, text, folder)
        ways: dict[str, Way] = {
            "the same with use_faiss=True": lambda: theirs.mine(use_faiss=True),
            "find_negatives": ours,
        }
        peer = ("mine_hard_negatives, twice", lambda: theirs.mine(use_faiss=False))
        compare(f"Mining, {NUM_MINED:,} pairs, {K} texts and {K} images of each", peer, ways, runs)
        texts, images = (numbers(found) for found in theirs.mine(use_faiss=False))
    mined = ours()
    same = [share(texts, mined.texts), share(images, mined.images)]
    print(f"  of the negatives that the peer mined, we mined {same[0]:.4f} (texts) and {same[1]:.4f} (images)")


def numbers(found: Any) -> Tensor:
    """Return the negatives of a data set of the peer as numbers of pairs, `(pairs, k)`."""
    columns = [found[f"negative_{i}"] for i in range(1, K + 1)]
    return torch.tensor([[int(word[1:]) for word in column] for column in columns]).T


def share(theirs: Tensor, ours: Tensor) -> float:
    """Return the fraction of the first table's entries that stand in the same row of the second."""
    hits = sum(len(set(a) & set(b)) for a, b in zip(theirs.tolist(), ours.tolist(), strict=True))
    return hits / theirs.numel()


class Theirs:
    """Mine given embeddings with sentence-transformers.

    Each image and each text is one word, such as ``i7`` and ``t7``, and the model is a table of one row per word. The first
    run writes the embeddings into the peer's own cache, so that later runs encode nothing.

    Args:
        image: Embeddings of the images `(pairs, dim)`.
        text: Embeddings of the texts `(pairs, dim)`.
        cache: A folder.
    """

    def __init__(self, image: Tensor, text: Tensor, cache: str) -> None:
        from datasets import Dataset, disable_progress_bars
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel

        disable_progress_bars()
        self.words = {side: [f"{side[0]}{i}" for i in range(len(image))] for side in ("image", "text")}
        known = {word: i for i, word in enumerate([*self.words["image"], *self.words["text"], "?"])}
        rows = torch.cat([image, text, torch.zeros(1, image.shape[1])])
        tokenizer = Tokenizer(WordLevel(known, unk_token="?"))
        self.model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, rows)], device="cpu")
        self.pairs, self.cache = Dataset.from_dict(self.words), cache

    def mine(self, *, use_faiss: bool) -> tuple[Any, Any]:
        """Return the mined texts of each image, and the mined images of each text, as data sets of the peer."""
        return self._mine("image", "text", use_faiss), self._mine("text", "image", use_faiss)

    def _mine(self, anchor: str, positive: str, use_faiss: bool) -> Any:
        from sentence_transformers.util import mine_hard_negatives

        options: dict[str, Any] = {"num_negatives": K, "relative_margin": MARGIN, "use_faiss": use_faiss}
        options |= {"output_format": "n-tuple", "cache_folder": self.cache, "verbose": False}
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            found = mine_hard_negatives(
                self.pairs, self.model, anchor_column_name=anchor, positive_column_name=positive, **options
            )
        if len(found) != len(self.pairs):
            raise RuntimeError(f"Expected {K} negatives for each of {len(self.pairs)} anchors, got {len(found)} rows.")
        return found
