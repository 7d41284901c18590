import pytest
import torch
from torch.nn.functional import normalize

from lightning_itm.mining import EncodedPairs, find_negatives
from lightning_itm.mining.search import padded_rows

NUM_IMAGES, NUM_TEXTS = 30, 70
DIM = 5  # so few that some cosines are far below 0, and some negatives beat positives
UNREADABLE_IMAGE, UNREADABLE_TEXT = 3, 8


def encoded():
    text_image_id = torch.cat([torch.arange(NUM_IMAGES), torch.randint(0, NUM_IMAGES, (NUM_TEXTS - NUM_IMAGES,))])
    image_is_valid, text_is_valid = torch.ones(NUM_IMAGES) > 0, torch.ones(NUM_TEXTS) > 0
    image_is_valid[UNREADABLE_IMAGE] = text_is_valid[UNREADABLE_TEXT] = False
    vectors = (normalize(torch.randn(number, DIM)) for number in (NUM_IMAGES, NUM_TEXTS))
    return EncodedPairs(*vectors, text_image_id, image_is_valid, text_is_valid)


def slow_search(anchors, keys, is_own, key_is_valid, k, *, max_score=2.0, rank_min=0):
    """Search by one comparison after the other. Return a row per anchor, and the fraction of places that guards change."""
    rows, num_rejected, num_places = [], 0, 0
    for anchor, own in zip(anchors, is_own.tolist(), strict=True):
        candidates = [
            (float(anchor @ key), index) for index, key in enumerate(keys) if not own[index] and key_is_valid[index]
        ]
        candidates.sort(reverse=True)
        allowed = [candidate for candidate in candidates if candidate[0] <= max_score][rank_min:]
        rows.append([index for _, index in allowed[:k]])
        num_places += len(candidates[:k])
        num_rejected += len(set(candidates[:k]) - set(allowed))
    return rows, num_rejected / num_places


def without_empty_places(index):
    return [[value for value in row if value >= 0] for row in index.tolist()]


def of_valid(rows, is_valid):
    """Nothing is mined for an anchor that can't be read."""
    return [row if valid else [] for row, valid in zip(rows, is_valid.tolist(), strict=True)]


def own_texts(pairs):
    """Whether a text belongs to the image, or equals a text that does, bool `(images, texts)`."""
    is_own = torch.arange(NUM_IMAGES)[:, None] == pairs.text_image_id
    if pairs.caption_id is not None:
        captions = [pairs.caption_id[row].tolist() for row in is_own]  # of each image
        is_own = torch.tensor([[caption in own for caption in pairs.caption_id.tolist()] for own in captions])
    return is_own


@pytest.mark.parametrize("num_captions", [None, 8, 40])
@pytest.mark.parametrize("guards", [{}, {"max_score": 0.6}, {"rank_min": 2}, {"max_score": 0.6, "rank_min": 1}])
def test_equals_a_slow_loop(guards, num_captions):
    pairs = encoded()
    if num_captions is not None:
        pairs.caption_id = torch.randint(0, num_captions, (NUM_TEXTS,))
    mined, is_own = find_negatives(pairs, 9, 5, **guards), own_texts(pairs)
    images, texts = pairs.image_embeddings, pairs.text_embeddings
    expected_texts, rejected_texts = slow_search(images, texts, is_own, pairs.text_is_valid, 9, **guards)
    expected_images, rejected_images = slow_search(texts, images, is_own.T, pairs.image_is_valid, 5, **guards)
    assert without_empty_places(mined.texts) == of_valid(expected_texts, pairs.image_is_valid)
    assert without_empty_places(mined.images) == of_valid(expected_images, pairs.text_is_valid)
    assert mined.rejected_fraction == pytest.approx((rejected_texts + rejected_images) / 2)


def test_gap_is_that_of_the_positives_and_the_hardest():
    pairs = encoded()
    mined = find_negatives(pairs, 4, 4)
    similarity = pairs.image_embeddings @ pairs.text_embeddings.T
    gaps = []
    for image_id in pairs.image_is_valid.nonzero().squeeze(1).tolist():
        own = similarity[image_id][(pairs.text_image_id == image_id) & pairs.text_is_valid]
        gaps.append(own.mean() - similarity[image_id, mined.texts[image_id, 0]])
    for text_id in pairs.text_is_valid.nonzero().squeeze(1).tolist():
        own = similarity[pairs.text_image_id[text_id], text_id]
        gaps.append(own - similarity[mined.images[text_id, 0], text_id])
    assert mined.gap == pytest.approx(float(torch.stack(gaps).mean()), abs=1e-6)


def test_what_can_not_be_read_is_left_out():
    """Nor are the texts of an unreadable image, and an image whose only text is unreadable."""
    pairs = encoded()
    mined = find_negatives(pairs, NUM_TEXTS, NUM_IMAGES)
    texts_of_it = (pairs.text_image_id == UNREADABLE_IMAGE).nonzero().squeeze(1)
    assert not torch.isin(mined.texts, torch.cat([texts_of_it, torch.tensor([UNREADABLE_TEXT])])).any()
    assert not (mined.images == UNREADABLE_IMAGE).any()
    is_alone = (pairs.text_image_id == pairs.text_image_id[UNREADABLE_TEXT]).sum() == 1
    assert (mined.images == pairs.text_image_id[UNREADABLE_TEXT]).any() != is_alone


def test_rows_that_were_not_searched_are_empty():
    rows = padded_rows(torch.tensor([[4, 2]]), 3)
    assert rows.dtype == torch.int32
    assert rows.tolist() == [[4, 2], [-1, -1], [-1, -1]]
