"""Search with an index of FAISS: what may be found is that of the exact search, and which part of it is measured."""

import pytest
import torch
from torch.nn.functional import normalize

from lightning_itm.mining import EncodedPairs, NegativeTable, find_negatives
from lightning_itm.mining.search import approximate, fill_table
from lightning_itm.mining.search.approximate import sampled_valid, shared_fraction

faiss = pytest.importorskip("faiss")

NUM_IMAGES, NUM_TEXTS, DIM = 300, 700, 16
GUARDS = [
    {},
    {"max_score": 0.3},
    {"rank_min": 3},
    {"absolute_margin": 0.1},
    {"relative_margin": 0.05, "rank_min": 2, "max_score": 0.5},
]
NAMES = "texts", "images", "text_scores", "image_scores", "gap", "rejected_fraction"
FEW_LISTS = {"search": "faiss", "faiss_index": "IVF7,Flat nprobe=2"}  # 42 and more keys per list, so FAISS is content


def encoded(num_captions=None):
    text_image_id = torch.cat([torch.arange(NUM_IMAGES), torch.randint(0, NUM_IMAGES, (NUM_TEXTS - NUM_IMAGES,))])
    image_is_valid, text_is_valid = torch.rand(NUM_IMAGES) > 0.02, torch.rand(NUM_TEXTS) > 0.02
    vectors = (normalize(torch.randn(number, DIM)) for number in (NUM_IMAGES, NUM_TEXTS))
    caption_id = None if num_captions is None else torch.randint(0, num_captions, (NUM_TEXTS,))
    return EncodedPairs(*vectors, text_image_id, image_is_valid, text_is_valid, caption_id)


def is_equal(one, other):
    pairs = ((getattr(one, name), getattr(other, name)) for name in NAMES)
    return [torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs]


@pytest.mark.parametrize("num_captions", [None, 8, 300])
@pytest.mark.parametrize("guards", GUARDS)
def test_an_index_of_all_keys_gives_what_the_exact_search_gives(guards, num_captions):
    pairs = encoded(num_captions)
    mined = find_negatives(pairs, 30, 20, search="faiss", faiss_index="Flat", **guards)
    assert all(is_equal(mined, find_negatives(pairs, 30, 20, **guards)))
    assert mined.recall == 1


@pytest.mark.parametrize("guards", [{}, {"max_score": 0.1}])
def test_anchors_with_many_that_fall_out_are_asked_for_again(guards, monkeypatch):
    """With no neighbour to spare, and in small parts."""
    monkeypatch.setattr(approximate, "NUM_SPARE", -3)
    monkeypatch.setattr(approximate, "ENTRIES_AT_ONCE", 1000)
    pairs = encoded(num_captions=4)
    mined = find_negatives(pairs, 5, 4, search="faiss", faiss_index="Flat", **guards)
    assert all(is_equal(mined, find_negatives(pairs, 5, 4, **guards)))


def test_more_places_than_keys():
    pairs = encoded()
    counts = NUM_TEXTS + 5, NUM_IMAGES + 5
    mined = find_negatives(pairs, *counts, search="faiss", faiss_index="Flat")
    assert all(is_equal(mined, find_negatives(pairs, *counts)))


def test_nothing_to_search():
    pairs = encoded()
    pairs.text_is_valid[:] = pairs.image_is_valid[:] = False
    mined = find_negatives(pairs, 3, 2, search="faiss")
    assert (mined.texts == -1).all()
    assert (mined.images == -1).all()


@pytest.mark.filterwarnings("ignore:The index found")
@pytest.mark.parametrize("guards", [{}, {"relative_margin": 0.05, "rank_min": 1}])
def test_recall_is_what_a_comparison_with_the_exact_table_gives(guards):
    """All anchors are few enough to be in the sample."""
    pairs = encoded()
    mined, exact = find_negatives(pairs, 12, 6, **FEW_LISTS, **guards), find_negatives(pairs, 12, 6, **guards)
    recalls = []
    for name in ("texts", "images"):
        rows = zip(getattr(mined, name).tolist(), getattr(exact, name).tolist(), strict=True)
        found = [(len(set(row) & set(true) - {-1}), len(set(true) - {-1})) for row, true in rows]
        recalls.append(sum(hits for hits, _ in found) / sum(places for _, places in found))
    assert mined.recall == sum(recalls) / 2
    assert 0.05 < mined.recall < 0.95


@pytest.mark.filterwarnings("ignore:The index found")
def test_what_is_found_has_exact_scores_and_is_no_match():
    pairs = encoded(num_captions=40)
    mined = find_negatives(pairs, 12, 6, **FEW_LISTS, max_score=0.6)
    anchors, places = (mined.texts >= 0).nonzero(as_tuple=True)
    texts = mined.texts[anchors, places]
    scores = (pairs.image_embeddings[anchors] * pairs.text_embeddings[texts]).sum(dim=1)
    torch.testing.assert_close(mined.text_scores[anchors, places], scores)
    assert scores.max() <= 0.6
    assert pairs.text_is_valid[texts].all()
    of_image, _ = pairs.captions()
    assert not (of_image[anchors] == pairs.caption_id[texts][:, None]).any()
    assert (mined.text_scores.diff(dim=1) <= 0).logical_or(mined.text_scores[:, 1:].isinf()).all()
    assert (mined.texts[mined.text_scores.isinf()] == -1).all()


@pytest.mark.filterwarnings("ignore:The index found")
@pytest.mark.parametrize("name", ["IVF7,Flat nprobe=2", "HNSW8", "IVF7_HNSW4,SQ8 nprobe=2"])
def test_the_same_set_gives_the_same_table(name):
    pairs = encoded()
    one, other = (find_negatives(pairs, 12, 6, search="faiss", faiss_index=name) for _ in range(2))
    assert all(is_equal(one, other))
    assert one.recall == other.recall


def test_little_recall_is_told_with_a_way_out():
    with pytest.warns(
        UserWarning, match=r"The index found \d\d% of .*'IVF7,Flat nprobe=1'.*more lists.*search='exact'"
    ):
        find_negatives(encoded(), 12, 6, search="faiss", faiss_index="IVF7,Flat nprobe=1")


def test_the_table_logs_the_recall():
    table = NegativeTable(NUM_IMAGES, NUM_TEXTS, texts_per_image=5, images_per_text=4)
    logs = fill_table(table, encoded(), search="faiss", faiss_index="Flat")
    assert logs["mining/recall"] == 1
    assert "mining/recall" not in fill_table(table, encoded())


def test_the_sample_is_of_valid_anchors():
    is_valid = torch.rand(3000) > 0.5
    some = sampled_valid(is_valid)
    assert len(some.unique()) == approximate.NUM_RECALLED_ANCHORS
    assert is_valid[some].all()
    assert torch.equal(some, sampled_valid(is_valid))
    assert sampled_valid(is_valid[:10]).tolist() == is_valid[:10].nonzero().squeeze(1).tolist()


def test_nothing_expected_is_all_found():
    assert shared_fraction(torch.tensor([[3, -1]]), torch.tensor([[-1, -1]])) == 1


def test_threads_of_faiss_are_as_before():
    faiss.omp_set_num_threads(3)
    try:
        find_negatives(encoded(), 3, 2, search="faiss", faiss_index="Flat")
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(torch.get_num_threads())


def _mine_in_process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    pairs = encoded(num_captions=100)
    mined = find_negatives(pairs, 12, 6, rank=rank, world_size=2, rank_min=1, **FEW_LISTS)
    torch.save({name: getattr(mined, name) for name in (*NAMES, "recall")}, f"{folder}/{rank}.pt")
    with pytest.raises(ValueError, match="got 9000 lists for"):  # of rank 0, which tells the other
        find_negatives(pairs, 12, 6, rank=rank, world_size=2, search="faiss", faiss_index="IVF9000,Flat")
    torch.distributed.destroy_process_group()


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:The index found")
def test_two_processes_mine_the_table_of_one(tmp_path):
    torch.multiprocessing.start_processes(_mine_in_process, (str(tmp_path),), nprocs=2, start_method="fork")
    torch.manual_seed(0)
    expected = find_negatives(encoded(num_captions=100), 12, 6, rank_min=1, **FEW_LISTS)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(got[name], getattr(expected, name)) for name in NAMES[:4])
        assert [got[name] for name in NAMES[4:]] == [expected.gap, expected.rejected_fraction]
        assert got["recall"] == expected.recall


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["Flat", "IVF7,Flat nprobe=7", "HNSW16 efSearch=300"])
def test_embeddings_on_a_gpu(name):
    pairs = encoded()
    on_gpu = EncodedPairs(*(None if part is None else part.cuda() for part in vars(pairs).values()))
    mined, expected = find_negatives(on_gpu, 12, 6, search="faiss", faiss_index=name), find_negatives(on_gpu, 12, 6)
    assert mined.recall > 0.99
    assert (mined.texts == expected.texts).float().mean() > 0.98
