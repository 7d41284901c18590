import pytest
import torch
from lightning.fabric.utilities import move_data_to_device

from lightning_itm.embeddings import EmbeddingPairs, HardNegatives

IDS = torch.arange(2)


def mined():
    rows = torch.arange(8.0).view(4, 2, 1)
    return HardNegatives(
        text_embeddings=rows[0],
        image_of_text_embeddings=rows[1],
        image_id_of_text=torch.tensor([5, -1]),
        image_embeddings=rows[2],
        text_of_image_embeddings=rows[3],
        image_id=torch.tensor([7, 8]),
    )


class TestEmbeddingPairs:
    def test_sum_has_the_rows_of_both_in_order(self):
        first = EmbeddingPairs(torch.eye(2), torch.eye(2), IDS, IDS)
        second = EmbeddingPairs(2 * torch.eye(2), 3 * torch.eye(2), IDS + 2, IDS + 4)
        both = first + second
        assert len(both) == 4
        assert torch.equal(both.image_embeddings, torch.cat([torch.eye(2), 2 * torch.eye(2)]))
        assert torch.equal(both.text_embeddings, torch.cat([torch.eye(2), 3 * torch.eye(2)]))
        assert both.image_id.tolist() == [0, 1, 2, 3]
        assert both.text_id.tolist() == [0, 1, 4, 5]

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
    def test_ids_become_int64(self, dtype):
        pairs = EmbeddingPairs(torch.eye(2), torch.eye(2), IDS.to(dtype), IDS.to(dtype))
        assert pairs.image_id.dtype == pairs.text_id.dtype == torch.int64
        assert pairs.image_id.tolist() == pairs.text_id.tolist() == [0, 1]

    def test_sum_of_pairs_with_captions_and_pairs_without(self):
        without = EmbeddingPairs(torch.eye(2), torch.eye(2), IDS, IDS)
        captioned = EmbeddingPairs(torch.eye(2), torch.eye(2), IDS, IDS, IDS.int() + 7)
        assert (captioned + captioned).caption_id.tolist() == [7, 8, 7, 8]
        assert (captioned + without).caption_id.tolist() == [7, 8, -1, -1]
        assert (without + captioned).caption_id.tolist() == [-1, -1, 7, 8]
        assert (without + without).caption_id is None
        assert without.gather().caption_id is None
        assert captioned.gather().caption_id.tolist() == [7, 8]
        assert captioned.map(lambda part: part[1:]).caption_id.tolist() == [8]

    def test_captions_of_another_number_or_kind(self):
        with pytest.raises(ValueError, match="one row per pair in all"):
            EmbeddingPairs(torch.eye(2), torch.eye(2), IDS, IDS, torch.arange(3))
        with pytest.raises(TypeError, match=r"`caption_id` to be an int64 tensor of shape \(pairs,\), got list"):
            EmbeddingPairs(torch.eye(2), torch.eye(2), IDS, IDS, [0, 1])

    def test_two_widths(self):
        with pytest.raises(ValueError, match=r"got 3 \(image\) and 4 \(text\)"):
            EmbeddingPairs(torch.ones(2, 3), torch.ones(2, 4), IDS, IDS)

    def test_rows_that_do_not_match(self):
        with pytest.raises(ValueError, match="one row per pair"):
            EmbeddingPairs(torch.ones(2, 3), torch.ones(3, 3), IDS, IDS)

    def test_embeddings_that_are_no_rows(self):
        with pytest.raises(ValueError, match=r"`text_embeddings` to have the shape \(pairs, dim\), got \(2, 3, 4\)"):
            EmbeddingPairs(torch.ones(2, 3), torch.ones(2, 3, 4), IDS, IDS)

    @pytest.mark.parametrize(("ids", "got"), [(torch.ones(2), r"torch\.float32 \(2,\)"), ([0, 1], "list")])
    def test_ids_that_are_no_integers(self, ids, got):
        with pytest.raises(TypeError, match=rf"`image_id` to be an int64 tensor of shape \(pairs,\), got {got}"):
            EmbeddingPairs(torch.ones(2, 3), torch.ones(2, 3), ids, IDS)


class TestHardNegatives:
    def test_as_pairs_keeps_what_matches_together(self):
        """First all (I4, T3), then all (I3, T4), and a row that was not mined keeps its id −1."""
        pairs, hard = mined().as_pairs(), mined()
        assert torch.equal(pairs.image_embeddings, torch.cat([hard.image_of_text_embeddings, hard.image_embeddings]))
        assert torch.equal(pairs.text_embeddings, torch.cat([hard.text_embeddings, hard.text_of_image_embeddings]))
        assert pairs.image_id.tolist() == [5, -1, 7, 8]
        assert (pairs.text_id == -1).all()

    def test_holds_nothing_that_lightning_could_take_for_the_size_of_a_batch(self):
        assert list(mined()) == []

    def test_goes_to_another_device_with_its_batch(self):
        moved = move_data_to_device({"hard": mined()}, torch.device("meta"))["hard"]
        assert moved.text_embeddings.is_meta
        assert moved.image_id.is_meta


def test_mined_pairs_have_the_captions_of_their_texts():
    hard = mined()
    assert hard.as_pairs().caption_id is None
    hard.caption_id, hard.caption_id_of_image = torch.tensor([4, -1]), torch.tensor([5, 6])
    assert hard.as_pairs().caption_id.tolist() == [4, -1, 5, 6]
