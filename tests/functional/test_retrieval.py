import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_itm.functional import recall_at_k, retrieval_rank
from lightning_itm.functional.retrieval import retrieval_ranks
from tests.reference import retrieval as reference


@st.composite
def grids(draw):
    """Vectors of small integers: dot products are exact, ties are many, half of the scores are negative."""
    num_images, num_texts = draw(st.integers(1, 9)), draw(st.integers(0, 30))
    owner = list(range(num_images)) + draw(st.lists(st.integers(0, num_images - 1), max_size=num_texts))
    values = st.lists(st.integers(-2, 2), min_size=3, max_size=3)
    rows = draw(st.lists(values, min_size=num_images + len(owner), max_size=num_images + len(owner)))
    vectors = torch.tensor(rows, dtype=torch.float32)
    return vectors[:num_images], vectors[num_images:], torch.tensor(owner)


@given(grids(), st.integers(1, 40))
def test_equals_the_loop_in_chunks_of_any_size(grid, chunk_elements):
    image, text, owner = grid
    ids = torch.arange(len(image))
    expected = reference.retrieval(image, text, owner)
    ranks = {
        "i2t": retrieval_rank(image, text, query_id=ids, key_id=owner, chunk_elements=chunk_elements),
        "t2i": retrieval_rank(text, image, query_id=owner, key_id=ids, chunk_elements=chunk_elements),
    }
    for way, rank in ranks.items():
        assert (1 + rank.double().mean()).item() == pytest.approx(expected[f"{way}_mean_rank"])
        for k in (1, 5, 10):
            assert recall_at_k(rank, k).item() == pytest.approx(expected[f"{way}_r{k}"])


@given(st.integers(1, 70), st.integers(2, 33), st.sampled_from([1, 3, 17, 64]))
def test_equal_rows_tie_wherever_they_stand(num_rows, dim, chunk_rows):
    """A product of equal rows can differ by rounding with its place in the matrix; no query may win by that."""
    vector = torch.nn.functional.normalize(torch.randn(dim), dim=0).expand(num_rows, dim)
    ids = torch.arange(num_rows)
    rank = retrieval_rank(vector, vector, query_id=ids, key_id=ids, chunk_elements=chunk_rows * num_rows)
    assert (rank == num_rows - 1).all()


def test_a_score_that_is_no_number_counts_against_the_model():
    ids = torch.arange(3)
    rank = retrieval_rank(torch.full((3, 2), torch.nan), torch.randn(3, 2), query_id=ids, key_id=ids)
    assert rank.tolist() == [2, 2, 2]


def test_a_query_without_a_right_key_finds_nothing():
    eye = torch.eye(2)
    assert retrieval_rank(eye[:1], eye, query_id=torch.tensor([5]), key_id=torch.arange(2)).tolist() == [2]


@pytest.mark.parametrize("spread", [0.0, 1e-9, 1e-7, 1e-5, 1e-3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_are_those_of_float64_however_near_the_scores_are(spread, dtype):
    """Products in float32 are off by 1e-7, so at most spreads some scores must be computed again."""
    num_images, dim = 40, 24
    owner = torch.arange(num_images).repeat_interleave(3)[torch.randperm(3 * num_images)]
    centre = torch.randn(dim, dtype=torch.float64)
    image, text = (
        torch.nn.functional.normalize(centre + spread * torch.randn(rows, dim, dtype=torch.float64), dim=1).to(dtype)
        for rows in (num_images, len(owner))
    )
    ids = torch.arange(num_images)
    i2t, t2i = retrieval_ranks(image, text, query_id=ids, key_id=owner, chunk_elements=500)
    exact = image.double() @ text.double().T
    right = ids[:, None] == owner
    for rank, scores, is_right in ((i2t, exact, right), (t2i, exact.T, right.T)):
        best = scores.masked_fill(~is_right, -2).amax(dim=1, keepdim=True)
        assert torch.equal(rank, ((scores >= best - 1e-12) & ~is_right).sum(dim=1))


def test_ranks_of_both_directions_are_those_of_each():
    image, text, owner = torch.randn(30, 8), torch.randn(50, 8), torch.randint(25, (50,))  # five images without a text
    ids = torch.arange(30)
    i2t, t2i = retrieval_ranks(image, text, query_id=ids, key_id=owner)
    assert torch.equal(i2t, retrieval_rank(image, text, query_id=ids, key_id=owner))
    assert torch.equal(t2i, retrieval_rank(text, image, query_id=owner, key_id=ids))
    assert (i2t[25:] == 50).all()
