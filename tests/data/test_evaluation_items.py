import pytest
import torch

from lightning_itm import ImageTextDataset
from lightning_itm.data import EvaluationItems, TextsOfImages, UnreadablePairError
from tests.helpers.pictures import captions, cut_outs
from tests.helpers.tiny import AUGMENTED, NUM_IMAGES, PLAIN, tiny_pairs

NUM_TEXTS = 2 * NUM_IMAGES


def broken(*image_ids, num_images=4):
    images = cut_outs(num_images)
    for image_id in image_ids:
        images[image_id] = b"no image"
    return ImageTextDataset(images, captions(num_images), transform=AUGMENTED, eval_transform=PLAIN)


class TestEvaluationItems:
    def test_are_all_inputs_with_evaluation_transforms(self):
        pairs = tiny_pairs()
        images, texts = EvaluationItems(pairs, "image"), EvaluationItems(pairs, "text")
        assert (len(images), len(texts)) == (NUM_IMAGES, NUM_TEXTS)
        view = pairs.evaluation()
        for item in (images[i] for i in range(NUM_IMAGES)):
            assert item["image_is_valid"]
            assert torch.equal(item["image"], view.load_image(item["image_id"]))
        assert [texts[i]["text_id"] for i in range(NUM_TEXTS)] == list(range(NUM_TEXTS))
        assert not pairs.is_evaluation, "the training set itself stays as it was"

    @pytest.mark.parametrize("unreadable", [(1,), (1, 2), (3,)])
    def test_another_readable_one_stands_in(self, unreadable):
        pairs = broken(*unreadable)
        items, view = EvaluationItems(pairs, "image"), pairs.evaluation()
        for image_id in range(4):
            item = items[image_id]
            assert item["image_id"] == image_id
            assert item["image_is_valid"] == (image_id not in unreadable)
            shown = [
                other
                for other in range(4)
                if other not in unreadable and torch.equal(item["image"], view.load_image(other))
            ]
            assert shown if image_id in unreadable else shown == [image_id]
            assert torch.equal(item["image"], items[image_id]["image"]), "always the same"

    def test_stand_ins_are_among_the_first_in_a_trial_run(self):
        items = EvaluationItems(broken(1), "image", 2)
        assert len(items) == 2
        assert torch.equal(items[1]["image"], items[0]["image"])

    def test_nothing_can_be_read(self):
        with pytest.raises(UnreadablePairError, match=r"None of the 4 images can be read\. The first: Image 2"):
            EvaluationItems(broken(0, 1, 2, 3), "image")[2]


class TestTextsOfImages:
    def test_equals_a_slow_loop(self):
        text_image_id = torch.randint(0, 7, (40,))
        texts = TextsOfImages(text_image_id, 9)  # images 7 and 8 have none
        for image_id in range(9):
            expected = [text_id for text_id in range(40) if text_image_id[text_id] == image_id]
            assert int(texts.count[image_id]) == len(expected)
            image_ids = torch.full((len(expected),), image_id)
            assert texts.text_id(image_ids, torch.arange(len(expected))).tolist() == expected
