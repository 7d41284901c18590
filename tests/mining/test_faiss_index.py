"""The index of FAISS: its name, its default, and what is refused."""

import pytest
import torch
from torch.nn.functional import normalize

from lightning_itm import NegativeWriter, OfflineHardNegativeMining, mine
from lightning_itm.mining.search.faiss_index import FaissIndex, check_index, default_index
from tests.helpers.tiny import Tiny, tiny_pairs

pytest.importorskip("faiss")

ALL = [
    lambda **options: OfflineHardNegativeMining(**options),
    lambda **options: NegativeWriter("mined", **options),
    lambda **options: mine(Tiny(), tiny_pairs(), **options),
]


def keys(num=400, dim=16):
    return normalize(torch.randn(num, dim))


@pytest.mark.parametrize("ask", ALL)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": "annoy"}, "`search` to be one of 'exact', 'faiss', got 'annoy'"),
        ({"faiss_index": "Flat"}, "`search='faiss'` with `faiss_index`, got 'exact' and 'Flat'"),
        ({"search": "faiss", "faiss_index": "IVF8,Flatt"}, "'IVF8,Flatt'. FAISS says: .*could not parse.*leave"),
        ({"search": "faiss", "faiss_index": "IVF8,Flat probes=3"}, "could not set parameter probes"),
        ({"search": "faiss", "faiss_index": "IVF8,Flat nprobe"}, "could not interpret parameters nprobe"),
        ({"search": "faiss", "faiss_index": "BIVF8"}, "index of float vectors, got the binary index 'BIVF8'"),
    ],
)
def test_what_is_refused_before_anything_is_encoded(ask, options, message):
    with pytest.raises(ValueError, match=message):
        ask(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_embeddings": True}, "Expected `split_embeddings=False` with `search='faiss'`, got True"),
        ({"table": "mined"}, "Expected no `search` with `table`, got faiss"),
    ],
)
def test_what_does_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        OfflineHardNegativeMining(search="faiss", **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("IVF500,Flat", "at most as many lists as keys in `faiss_index`, got 500 lists for 400 keys.*such as 'Flat'"),
        ("IVF4,PQ5", "for 400 keys of width 16.*got 'IVF4,PQ5'. FAISS says: .*multiple of the number of subquantizers"),
        ("IDMap,Flat", "got 'IDMap,Flat'. FAISS says: add does not make sense with IndexIDMap"),
    ],
)
def test_what_is_refused_for_some_keys(name, message):
    with pytest.raises(ValueError, match=message):
        FaissIndex(keys(), name)


@pytest.mark.parametrize(
    "name", [None, "PQ48", "OPQ64_128,IVF4096_HNSW32,PQ64 nprobe=32,quantizer_efSearch=64", "PCA64,SQ8"]
)
def test_what_may_fit_some_keys_is_not_refused_early(name):
    check_index(name)


@pytest.mark.parametrize("num_keys", [10_000, 20_000, 100_000, 3_000_000])
def test_the_default_has_enough_keys_per_list(num_keys):
    name, _, parameters = default_index(num_keys).partition(" ")
    num_lists, nprobe = int(name.removeprefix("IVF").removesuffix(",Flat")), int(parameters.removeprefix("nprobe="))
    assert num_keys >= 39 * num_lists
    assert 1 <= nprobe <= num_lists / 16
    check_index(default_index(num_keys))


def test_parameters_reach_the_search():
    """One list has fewer than all keys, and all lists have all."""
    rows = keys()
    few, all_of_them = (FaissIndex(rows, f"IVF8,Flat nprobe={num}").nearest(rows[:5], 400) for num in (1, 8))
    assert (few < 0).any()
    assert (all_of_them.sort().values == torch.arange(400)).all()


def test_an_index_of_many_keys_is_trained_on_some(capfd):
    rows = keys(2000, 4)
    assert (FaissIndex(rows, "IVF2,Flat nprobe=2").nearest(rows, 1)[:, 0] == torch.arange(2000)).all()
    assert "WARNING" not in capfd.readouterr().err
