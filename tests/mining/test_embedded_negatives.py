import pytest
import torch
from torch.nn.functional import normalize

from lightning_itm.mining import EmbeddedNegatives

NUM_IMAGES, TEXTS_EACH, DIM = 20, 3, 8
NUM_TEXTS = NUM_IMAGES * TEXTS_EACH
TEXT_IMAGE_ID = torch.arange(NUM_TEXTS) % NUM_IMAGES  # the texts of an image are far from each other
TEXT_ID = torch.arange(NUM_TEXTS)
WITHOUT_TEXTS, WITHOUT_IMAGES = 4, 9  # an image, a text


def negatives(**options):
    texts = (torch.arange(NUM_IMAGES)[:, None] + 1 + torch.arange(6)) % NUM_TEXTS
    images = (TEXT_IMAGE_ID[:, None] + 1 + torch.arange(4)) % NUM_IMAGES
    texts[WITHOUT_TEXTS], images[WITHOUT_IMAGES] = -1, -1
    vectors = (normalize(torch.randn(number, DIM)) for number in (NUM_IMAGES, NUM_TEXTS))
    return EmbeddedNegatives(*vectors, texts, images, TEXT_IMAGE_ID, **options)


@pytest.mark.parametrize("coupled_ranks", [True, False])
def test_what_is_drawn_is_of_the_pairs_own_rows_and_matches(coupled_ranks):
    mined = negatives(coupled_ranks=coupled_ranks)
    hard = mined.draw(TEXT_IMAGE_ID, TEXT_ID, epoch=0)
    for row in range(NUM_TEXTS):
        texts, image = mined.hard_text_index[TEXT_IMAGE_ID[row]], int(hard.image_id[row])
        if TEXT_IMAGE_ID[row] == WITHOUT_TEXTS:
            assert hard.image_id_of_text[row] == -1
        else:
            (text_id,) = (mined.text_embeddings == hard.text_embeddings[row]).all(dim=1).nonzero().squeeze(1).tolist()
            assert text_id in texts.tolist()
            assert hard.image_id_of_text[row] == TEXT_IMAGE_ID[text_id]
            assert torch.equal(hard.image_of_text_embeddings[row], mined.image_embeddings[TEXT_IMAGE_ID[text_id]])
        if row == WITHOUT_IMAGES:
            assert image == -1
        else:
            assert image in mined.hard_image_index[row].tolist()
            own_texts = mined.text_embeddings[image == TEXT_IMAGE_ID]
            assert (own_texts == hard.text_of_image_embeddings[row]).all(dim=1).any()
            assert torch.equal(hard.image_embeddings[row], mined.image_embeddings[image])


def test_a_draw_depends_on_seed_epoch_and_text_alone():
    mined = negatives()
    whole = mined.draw(TEXT_IMAGE_ID, TEXT_ID, epoch=1).image_id
    order = torch.randperm(NUM_TEXTS)[:11]
    assert torch.equal(mined.draw(TEXT_IMAGE_ID[order], order, epoch=1).image_id, whole[order])
    assert not torch.equal(mined.draw(TEXT_IMAGE_ID, TEXT_ID, epoch=2).image_id, whole)
    assert not torch.equal(negatives(seed=1).draw(TEXT_IMAGE_ID, TEXT_ID, epoch=1).image_id, whole)


def test_every_place_and_every_text_of_an_image_is_drawn():
    mined = negatives(coupled_ranks=False)
    drawn = [mined.draw(TEXT_IMAGE_ID[:1], TEXT_ID[:1], epoch) for epoch in range(200)]
    assert {int(hard.image_id_of_text) for hard in drawn} == set(TEXT_IMAGE_ID[mined.hard_text_index[0]].tolist())
    assert {int(hard.image_id) for hard in drawn} == set(mined.hard_image_index[0].tolist())
    assert len({tuple(hard.text_of_image_embeddings[0].tolist()) for hard in drawn}) == TEXTS_EACH * 4


@pytest.mark.parametrize("coupled_ranks", [True, False])
def test_a_pair_without_mined_texts_draws_any_of_its_images(coupled_ranks):
    """There is no rank of a text that the image's could follow. Each as often as the others."""
    mined = negatives(coupled_ranks=coupled_ranks)
    own, (row,) = TEXT_ID[TEXT_IMAGE_ID == WITHOUT_TEXTS][:1], mined.hard_image_index[WITHOUT_TEXTS][None].tolist()
    image_id = torch.tensor([WITHOUT_TEXTS])
    drawn = [int(mined.draw(image_id, own, epoch).image_id) for epoch in range(400)]
    assert sorted(set(drawn)) == sorted(row)
    assert min(drawn.count(image) for image in row) > 60  # of 100 expected


def test_draws_have_the_numbers_of_their_captions():
    caption_id = torch.arange(NUM_TEXTS) // 2 + 7
    mined = negatives(caption_id=caption_id)
    hard = mined.draw(TEXT_IMAGE_ID, TEXT_ID, epoch=0)
    for ids, captions, embeddings in (
        (hard.image_id_of_text, hard.caption_id, hard.text_embeddings),
        (hard.image_id, hard.caption_id_of_image, hard.text_of_image_embeddings),
    ):
        (drawn,) = (mined.text_embeddings == embeddings[:, None]).all(dim=2).int().argmax(dim=1)[None]  # text ids
        assert torch.equal(captions, torch.where(ids >= 0, caption_id[drawn], -1))
        assert (captions == -1).any()
    assert negatives().draw(TEXT_IMAGE_ID, TEXT_ID, epoch=0).caption_id is None
