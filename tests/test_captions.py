import unicodedata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_itm.captions import captions_of_images, fold_caption, is_shared, number_captions


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("  A\tDog \n runs", "a dog runs"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("Cafe\u0301", "café"),
        ("ﬁve 犬\u3000①", "five 犬 1"),
        ("A dog.", "a dog."),
    ],
)
def test_folded(text, folded):
    assert fold_caption(text) == folded


@given(st.text(st.characters(exclude_categories=())))
def test_folding_ignores_form_case_and_white_space(text):
    folded = fold_caption(text)
    assert fold_caption(folded) == folded
    assert fold_caption(unicodedata.normalize("NFD", text)) == folded
    assert fold_caption(f" {text}\n") == folded


@st.composite
def sets(draw):
    """Few captions, so that many are shared, in up to nine images of one to several captions each."""
    texts = draw(st.lists(st.sampled_from(["a", "A ", "b", "B", "c", "", " "]), min_size=1, max_size=15))
    num_images = draw(st.integers(1, 9))
    owner = draw(st.lists(st.integers(0, num_images - 1), min_size=len(texts), max_size=len(texts)))
    return texts, torch.tensor(owner), num_images


@given(sets())
def test_numbers_equal_a_loop(case):
    texts, owner, num_images = case
    folded = [text.strip().lower() or f"empty {number}" for number, text in enumerate(texts)]
    images_of = {text: {o for t, o in zip(folded, owner.tolist(), strict=True) if t == text} for text in folded}
    caption_id = number_captions(texts, owner)
    if all(len(images) == 1 for images in images_of.values()):
        assert caption_id is None
        return
    assert caption_id.dtype == torch.int64
    assert caption_id.tolist() == [list(images_of).index(text) for text in folded]
    shared = [len(images_of[text]) > 1 for text in folded]
    assert is_shared(caption_id, owner).tolist() == shared
    rows = captions_of_images(caption_id, owner, num_images)
    for image_id, row in enumerate(rows.tolist()):
        expected = {caption_id[t].item() for t in range(len(texts)) if shared[t] and owner[t] == image_id}
        assert sorted(row) == sorted([*expected, *[-1] * (len(row) - len(expected))])


def test_a_caption_that_is_not_known_is_shared_with_nobody():
    caption_id, owner = torch.tensor([-1, -1, 3, 3, 5]), torch.arange(5)
    assert is_shared(caption_id, owner).tolist() == [False, False, True, True, False]
    assert captions_of_images(caption_id, owner, 5).tolist() == [[-1], [-1], [3], [3], [-1]]
