import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from lightning_itm import ImageTextDataset
from lightning_itm.mining import EncodedPairs, EncodedRows, encode_pairs
from tests.helpers.pictures import captions, cut_outs
from tests.helpers.tiny import AUGMENTED, NUM_IMAGES, PLAIN, SILENT, Tiny, tiny_pairs, tokenize

NUM_TEXTS = 2 * NUM_IMAGES


def encode(model, pairs, num_texts=NUM_TEXTS, *, num_workers=0, **options):
    trainer = L.Trainer(**SILENT, **options)
    return encode_pairs(trainer, model, pairs, num_texts, batch_size=7, num_workers=num_workers)


class TestEncodePairs:
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_are_the_embeddings_of_each_input_alone(self, num_workers):
        model, pairs = Tiny(), tiny_pairs()
        encoded, view = encode(model, pairs, num_workers=num_workers), pairs.evaluation()
        model.eval()
        with torch.no_grad():
            images = [model.encode_image(view.load_image(i)[None])[0] for i in range(NUM_IMAGES)]
            texts = [model.encode_text(view.load_text(i)[None])[0] for i in range(NUM_TEXTS)]
        torch.testing.assert_close(encoded.image_embeddings, normalize(torch.stack(images)))
        torch.testing.assert_close(encoded.text_embeddings, normalize(torch.stack(texts)))
        assert encoded.image_is_valid.all()
        assert encoded.text_is_valid.all()

    def test_leaves_flags_gradients_and_random_streams_as_they_were(self):
        model = Tiny()
        model.text_encoder.eval()
        flags, state = [part.training for part in model.modules()], torch.get_rng_state()
        encoded = encode(model, tiny_pairs())
        assert [part.training for part in model.modules()] == flags
        assert torch.equal(torch.get_rng_state(), state)
        assert not encoded.image_embeddings.requires_grad
        assert not encoded.image_embeddings.is_inference(), "a loss multiplies it with tensors that have a gradient"

    def test_float32_in_every_precision(self):
        encoded = encode(Tiny(), tiny_pairs(), precision="bf16-mixed")
        assert encoded.image_embeddings.dtype == torch.float32
        torch.testing.assert_close(encoded.image_embeddings.norm(dim=1), torch.ones(NUM_IMAGES))

    def test_the_first_texts_with_their_images(self):
        encoded = encode(Tiny(), tiny_pairs(), 9)
        assert (len(encoded.image_embeddings), len(encoded.text_embeddings)) == (5, 9)

    def test_what_can_not_be_read_is_invalid(self):
        images, texts = cut_outs(4), captions(4)
        images[1], texts[3] = b"no image", ["", "a square"]
        pairs = ImageTextDataset(images, texts, transform=AUGMENTED, eval_transform=PLAIN, tokenizer=tokenize)
        encoded = encode(Tiny(), pairs, 8)
        assert encoded.image_is_valid.tolist() == [True, False, True, True]
        assert encoded.text_is_valid.tolist() == [True, True, False, False, True, True, False, True]

    def test_embeddings_that_are_not_finite(self):
        model = Tiny()
        nn.init.constant_(model.text_encoder.weight, torch.nan)
        with pytest.raises(ValueError, match=r"finite text embeddings when mining on rank 0, epoch 0, got NaN"):
            encode(model, tiny_pairs())


class TestEncodedPairs:
    def test_a_text_needs_its_image_and_an_image_a_text(self):
        owner = torch.tensor([0, 0, 1, 2])
        image_is_valid, text_is_valid = torch.tensor([True, True, False]), torch.tensor([True, False, False, True])
        encoded = EncodedPairs(torch.eye(3), torch.ones(4, 3), owner, image_is_valid, text_is_valid)
        assert encoded.text_is_valid.tolist() == [True, False, False, False]
        assert encoded.image_is_valid.tolist() == [True, False, False]

    def test_positive_is_a_mean_over_the_texts_of_an_image(self):
        texts = torch.tensor([[1.0, 0], [0.6, 0.8], [0.8, 0.6]])
        valid = torch.ones(3) > 0
        encoded = EncodedPairs(torch.eye(2), texts, torch.tensor([0, 0, 1]), valid[:2], valid)
        of_image, of_text = encoded.positive()
        torch.testing.assert_close(of_image, torch.tensor([0.8, 0.6]))
        torch.testing.assert_close(of_text, torch.tensor([1.0, 0.6, 0.6]))


class TestEncodedRows:
    def test_puts_batches_in_the_order_of_the_ids(self):
        """The last row may come twice, where ranks were made equal."""
        rows = EncodedRows("text", 5)
        for ids in ([3, 0], [4, 1, 2], [4]):
            ids = torch.tensor(ids)
            rows.add({"text": ids[:, None].float(), "text_id": ids, "text_is_valid": ids != 1})
        embeddings, is_valid = rows.in_order(way_out="None.")
        assert embeddings.tolist() == [[0], [1], [2], [3], [4]]
        assert is_valid.tolist() == [True, False, True, True, True]

    def test_not_finite(self):
        rows = EncodedRows("image", 1)
        rows.add(
            {"image": torch.tensor([[torch.inf]]), "image_id": torch.zeros(1).long(), "image_is_valid": torch.ones(1)}
        )
        with pytest.raises(ValueError, match=r"Expected finite image embeddings, got NaN or infinity\. Train less\."):
            rows.in_order(way_out="Train less.")
