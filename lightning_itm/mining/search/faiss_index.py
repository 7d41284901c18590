"""An index of FAISS over the keys of a search. It is trained once, by rank 0, so that all ranks have the same."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_itm.distributed import of_first_rank

TRAINING_POINTS = 256
"""Most keys per list that are used to train an index, as in FAISS."""
LEAST_POINTS = 39
"""Fewest keys per list for which FAISS does not complain."""
LEAST_KEYS = 10_000
"""With fewer keys, the default index compares all of them."""
MOST_ON_GPU = 2_048
"""Most neighbours that FAISS can find per anchor on a GPU."""
ROWS_AT_ONCE = 65_536


def import_faiss() -> Any:
    """Return the module ``faiss``.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "Expected the package `faiss`, which has the indexes of `search='faiss'`, got none. Install it: "
            'pip install "lightning_itm[faiss]".'
        ) from error
    return faiss


def default_index(num_keys: int) -> str:
    """Return the index that is taken where none is named: an inverted file of uncompressed keys.

    It has 4 √keys lists, or fewer where FAISS would have too few keys per list to train them. Per anchor, as many lists are
    searched as the square root of their number.

    Example:
        >>> from lightning_itm.mining.search.faiss_index import default_index
        >>> default_index(1_000_000), default_index(5_000)
        ('IVF4000,Flat nprobe=63', 'Flat')
    """
    if num_keys < LEAST_KEYS:
        return "Flat"
    num_lists = min(4 * math.isqrt(num_keys), num_keys // LEAST_POINTS)
    return f"IVF{num_lists},Flat nprobe={math.isqrt(num_lists)}"


def check_index(name: str | None) -> None:
    """Raise if FAISS is not installed, or can't read the name of an index, before anything is encoded.

    What depends on the keys is told when they are there. A few kinds of index fail only then, too, such as ``LSH``.

    Args:
        name: A factory string, and after a space the parameters of the search. ``None``: the default is taken.

    Raises:
        ImportError: if FAISS is not installed.
        ValueError: if the name is none that FAISS knows.
    """
    faiss = import_faiss()
    if name is None:
        return
    if name.startswith("B"):
        raise ValueError(
            f"Expected `faiss_index` to be an index of float vectors, got the binary index {name!r}. Leave its 'B' out."
        )
    try:
        with _explained(name):
            _make(faiss, name, width=960)  # which most numbers of subquantizers divide
    except ValueError as error:
        # What depends on the width, or on the number of keys, is told when these are known.
        if "could not" in str(error):
            raise


class FaissIndex:
    """Hold all keys in an index, on the GPU of the keys where FAISS has such an index there. Every rank must make it.

    Args:
        keys: float32 `(keys, dim)`, unit-norm, the same on every rank. At least one.
        name: A factory string of FAISS, and after a space what ``faiss.ParameterSpace`` sets for the search, such as
            ``"IVF4096,PQ64x4fs nprobe=64"``. Default: :func:`default_index`.

    Attributes:
        most: Most neighbours that can be asked for per anchor.

    Raises:
        ValueError: on every rank, if FAISS can't make this index for these keys.
    """

    def __init__(self, keys: Tensor, name: str | None = None) -> None:
        self._faiss, self._gpu = import_faiss(), keys.device.index or 0
        self.name, self._resources = default_index(len(keys)) if name is None else name, None
        if keys.is_cuda and self._faiss.get_num_gpus():
            self._resources = self._faiss.StandardGpuResources()
        trained = self._faiss.deserialize_index(of_first_rank(lambda: self._faiss.serialize_index(self._trained(keys))))
        with _explained(self.name, keys):
            _set_parameters(self._faiss, trained, self.name)
            self._index = self._on_gpu(trained)
            self._add(keys)
        self.most = min(len(keys), MOST_ON_GPU) if self.is_on_gpu else len(keys)

    @property
    def is_on_gpu(self) -> bool:
        """Whether a GPU searches."""
        return self._resources is not None

    def nearest(self, anchors: Tensor, num: int) -> Tensor:
        """Return the rows of the keys that it finds near each anchor, int64 `(anchors, num)`, −1 where it finds no more."""
        with _threads(self._faiss, torch.get_num_threads()), _explained(self.name):
            _, rows = self._index.search(anchors.cpu().numpy(), num)
        return torch.from_numpy(rows).to(anchors.device)

    def _trained(self, keys: Tensor) -> Any:
        """Return an index that is trained and has no keys."""
        with _explained(self.name, keys):
            index = _make(self._faiss, self.name, keys.shape[1])
        lists = _lists(self._faiss, index)
        num_lists = 256 if lists is None else lists.nlist
        if num_lists > len(keys) and lists is not None:
            raise ValueError(
                f"Expected at most as many lists as keys in `faiss_index`, got {num_lists} lists for {len(keys)} keys in "
                f"{self.name!r}. Name fewer, such as {default_index(len(keys))!r}, or leave `faiss_index` out."
            )
        if index.is_trained:
            return index
        centres: Any = None
        if lists is not None and self.is_on_gpu:  # the centres of the lists take most of the time
            centres = self._faiss.index_cpu_to_gpu(self._resources, self._gpu, self._faiss.IndexFlatIP(lists.d))
            lists.clustering_index = centres
            centres.this.own(True)  # the assignment gave it away to an index that never frees it
        most = TRAINING_POINTS * max(256, num_lists)
        if len(keys) > most:
            keys = keys[torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))[:most].to(keys.device)]
        # FAISS seeds all that it draws. But threads link the nodes of a graph in no fixed order.
        num_threads = 1 if self._has_graph else torch.get_num_threads()
        with _explained(self.name, keys), _threads(self._faiss, num_threads):
            try:
                index.train(keys.cpu().numpy())
            finally:
                if centres is not None:
                    lists.clustering_index = None
        return index

    def _on_gpu(self, index: Any) -> Any:
        if self._resources is None:
            return index
        try:
            return self._faiss.index_cpu_to_gpu(self._resources, self._gpu, index)
        except RuntimeError:  # FAISS has it for the CPU only, such as a graph
            self._resources = None
            return index

    def _add(self, keys: Tensor) -> None:
        is_graph_of_keys = self._has_graph and _lists(self._faiss, self._index) is None
        with _threads(self._faiss, 1 if is_graph_of_keys else torch.get_num_threads()):
            # On a CPU all at once, because some graphs take no more keys later.
            for part in keys.split(ROWS_AT_ONCE if self.is_on_gpu else len(keys)):
                self._index.add(part.cpu().numpy())

    @property
    def _has_graph(self) -> bool:
        return "HNSW" in self.name or "NSG" in self.name


def _make(faiss: Any, name: str, width: int) -> Any:
    """Return an index that is not trained. The parameters are set too, to see whether FAISS knows them."""
    index = faiss.index_factory(width, name.partition(" ")[0], faiss.METRIC_INNER_PRODUCT)
    _set_parameters(faiss, index, name)
    return index


def _set_parameters(faiss: Any, index: Any, name: str) -> None:
    faiss.ParameterSpace().set_index_parameters(index, name.partition(" ")[2].strip())


def _lists(faiss: Any, index: Any) -> Any:
    """Return the inverted file inside an index, or None where it has none."""
    return faiss.try_extract_index_ivf(index)


@contextmanager
def _threads(faiss: Any, num: int) -> Iterator[None]:
    """Let FAISS, which has threads of its own, use so many."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


@contextmanager
def _explained(name: str, keys: Tensor | None = None) -> Iterator[None]:
    """Turn an error of FAISS into one that names the index."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("Error in "):
            raise  # it is none of FAISS: PyTorch may be out of memory
        reason = re.sub(r"^Error in .* at \S+:\d+: ", "", str(error), flags=re.DOTALL)
        what = "" if keys is None else f" for {len(keys)} keys of width {keys.shape[1]}"
        raise ValueError(
            f"Expected `faiss_index` to be a factory string of FAISS{what}, and after a space what is set for the search, "
            f"such as 'IVF4096,Flat nprobe=64', got {name!r}. FAISS says: {reason}. Name another, or leave `faiss_index` out."
        ) from error
