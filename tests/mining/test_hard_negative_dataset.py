import pytest
import torch

from lightning_itm import HardNegativeDataset, ImageTextDataset
from lightning_itm.mining import NegativeTable
from tests.helpers.pictures import captions, cut_outs
from tests.helpers.tiny import NUM_IMAGES, tiny_pairs

NUM_TEXTS = 2 * NUM_IMAGES
WITHOUT_TEXTS, WITHOUT_IMAGES, WITH_FOUR_TEXTS = 5, 11, 3  # rows of the table: an image, a text and an image


def mined_pairs(*, coupled_ranks=True, texts_per_image=10, images_per_text=2):
    """Return pairs of two texts per image, with a table of other images only. Some of its rows are not full."""
    pairs = tiny_pairs()
    table = NegativeTable(NUM_IMAGES, NUM_TEXTS, texts_per_image=texts_per_image, images_per_text=images_per_text)
    texts = torch.stack([(2 * row + 2 + torch.arange(texts_per_image)) % NUM_TEXTS for row in range(NUM_IMAGES)])
    images = torch.stack([(row // 2 + 1 + torch.arange(images_per_text)) % NUM_IMAGES for row in range(NUM_TEXTS)])
    texts[WITH_FOUR_TEXTS, 4:], texts[WITHOUT_TEXTS], images[WITHOUT_IMAGES] = -1, -1, -1
    table.publish(texts, images)
    return HardNegativeDataset(pairs, table, coupled_ranks=coupled_ranks)


class TestPairs:
    def test_draws_come_from_the_pairs_own_rows(self):
        pairs = mined_pairs()
        for index in (0, 1, 20, NUM_TEXTS - 1):
            row_of_texts, row_of_images = pairs.table.texts[index // 2], pairs.table.images[index]
            seen = set()
            for _ in range(40):
                sample = pairs[index]
                assert sample["hard"]["image_id_of_text"] in pairs.pairs.text_image_id[row_of_texts.long()].tolist()
                assert sample["hard"]["image_id"] in row_of_images.tolist()
                seen.add((sample["hard"]["image_id_of_text"], sample["hard"]["image_id"]))
            assert len(seen) > 3

    def test_coupled_ranks(self):
        """One draw n: the n-th text, and the image of rank n · 2 // 10."""
        pairs = mined_pairs()
        texts, images = pairs.table.texts[0].tolist(), pairs.table.images[0].tolist()
        for _ in range(60):
            text, image = pairs.draw(pairs.table.texts[0], pairs.table.images[0])
            assert images.index(image) == texts.index(text) * 2 // 10

    def test_two_draws_if_not_coupled(self):
        pairs = mined_pairs(coupled_ranks=False)
        rows = pairs.table.texts[0], pairs.table.images[0]
        drawn = {
            (rows[0].tolist().index(t), rows[1].tolist().index(i)) for t, i in (pairs.draw(*rows) for _ in range(200))
        }
        assert len(drawn) == 20

    @pytest.mark.parametrize("coupled_ranks", [True, False])
    def test_a_pair_without_mined_texts_draws_any_of_its_images(self, coupled_ranks):
        """There is no rank of a text that the image's could follow. Each as often as the others."""
        pairs = mined_pairs(coupled_ranks=coupled_ranks)
        texts, images = pairs.table.texts[WITHOUT_TEXTS], pairs.table.images[2 * WITHOUT_TEXTS]
        drawn = [pairs.draw(texts, images) for _ in range(200)]
        assert {text for text, _ in drawn} == {-1}
        assert min(sum(image == each for _, image in drawn) for each in images.tolist()) > 60  # of 100 expected

    def test_fewer_places(self):
        pairs = mined_pairs()
        drawn = [
            pairs.draw(pairs.table.texts[WITH_FOUR_TEXTS], pairs.table.images[2 * WITH_FOUR_TEXTS]) for _ in range(60)
        ]
        assert {text for text, _ in drawn} == {8, 9, 10, 11}

    def test_the_other_half_of_a_mined_pair_matches_it(self):
        """T3 with I4, and I3 with T4, are the data of a pair of the set."""
        pairs = mined_pairs()
        view = pairs.pairs.evaluation()
        pairs.pairs.transform = view.eval_transform
        owner = pairs.pairs.text_image_id
        for index in range(0, NUM_TEXTS, 5):
            sample = pairs[index]
            if sample["hard"]["image_id"] >= 0:
                texts = [view.load_text(i) for i in range(NUM_TEXTS) if owner[i] == sample["hard"]["image_id"]]
                assert any(torch.equal(sample["hard"]["text_of_image"], text) for text in texts)
                assert torch.equal(sample["hard"]["image"], view.load_image(sample["hard"]["image_id"]))
            if sample["hard"]["image_id_of_text"] >= 0:
                texts = [view.load_text(i) for i in range(NUM_TEXTS) if owner[i] == sample["hard"]["image_id_of_text"]]
                assert any(torch.equal(sample["hard"]["text"], text) for text in texts)
                assert torch.equal(sample["hard"]["image_of_text"], view.load_image(sample["hard"]["image_id_of_text"]))

    @pytest.mark.filterwarnings("ignore:46 of 46 pairs share their caption")
    def test_mined_samples_have_the_number_of_their_caption(self):
        """Captions of six kinds only. The text that comes says its kind."""
        pairs = mined_pairs()
        texts = [[f"kind {i % 3} a", f"kind {i % 3} b"] for i in range(NUM_IMAGES)]
        pairs.pairs = ImageTextDataset(cut_outs(NUM_IMAGES), texts)
        number = {text: int(caption) for text, caption in zip(pairs.pairs.texts, pairs.pairs.caption_id, strict=True)}
        for index in range(NUM_TEXTS):
            hard = pairs[index]["hard"]
            assert hard["caption_id"] == (-1 if hard["image_id_of_text"] < 0 else number[hard["text"]])
            assert hard["caption_id_of_image"] == (-1 if hard["image_id"] < 0 else number[hard["text_of_image"]])
        assert "caption_id" not in mined_pairs()[0]["hard"]

    def test_nothing_mined(self):
        pairs = mined_pairs()
        sample = pairs[2 * WITHOUT_TEXTS]
        assert sample["hard"]["image_id_of_text"] == -1
        assert torch.equal(sample["hard"]["text"], sample["text"])
        assert torch.equal(sample["hard"]["image_of_text"], sample["image"])
        assert pairs[WITHOUT_IMAGES]["hard"]["image_id"] == -1

    def test_a_mined_image_that_does_not_open(self):
        images = cut_outs(2)
        pairs = HardNegativeDataset(ImageTextDataset([images[0], b"none"], captions(2), max_unreadable=0.5))
        texts, places = torch.full((2, 300), -1), torch.full((4, 60), -1)
        texts[0, 0], places[0, 0] = 2, 1
        pairs.table.publish(texts, places)
        with pytest.warns(UserWarning, match="Image 1: bytes does not open"):
            sample = pairs[0]
        assert sample["hard"]["image_id"] == sample["hard"]["image_id_of_text"] == -1
        assert torch.equal(sample["hard"]["image"], sample["image"])

    def test_other_data(self):
        with pytest.raises(TypeError, match=r"Expected an ImageTextDataset, got list. Read other data"):
            HardNegativeDataset([1, 2, 3])

    def test_a_table_of_another_set(self):
        with pytest.raises(ValueError, match="a table of 23 images and 46 texts"):
            HardNegativeDataset(tiny_pairs(), NegativeTable(3, 4, texts_per_image=2, images_per_text=1))
