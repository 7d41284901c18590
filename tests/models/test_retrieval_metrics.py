import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_itm import ImageTextRetrieval
from lightning_itm.data import collate_pairs
from tests.helpers.tiny import NUM_IMAGES, SILENT, Tiny, tiny_data, tiny_pairs


def trainer():
    return L.Trainer(**SILENT)


def test_a_validation_that_broke_off_leaves_nothing_behind():
    class Breaks(Tiny):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx, dataloader_idx)
            if self.breaks and batch_idx == 3:
                raise KeyboardInterrupt("stopped")

    model, data = Breaks(), tiny_data()
    model.breaks = True
    with pytest.raises(BaseException, match=r"stopped|1"):
        trainer().validate(model, datamodule=data, verbose=False)
    model.breaks = False
    torch.nn.init.normal_(model.image_encoder[1].weight)
    assert "val/rsum" in trainer().validate(model, datamodule=data, verbose=False)[0]


def test_several_validation_sets_have_a_prefix_each():
    model = Tiny()
    loaders = [DataLoader(tiny_pairs(n).evaluation(), 8, collate_fn=collate_pairs) for n in (5, 9)]
    results = trainer().validate(model, loaders, verbose=False)[0]
    assert {"val/rsum", "val_1/rsum"} <= results.keys()
    assert results["val/i2t_mean_rank"] <= 9
    alone = trainer().validate(model, loaders[1], verbose=False)[0]
    assert alone["val/rsum"] == results["val_1/rsum"]


def test_metric_is_a_users_choice_and_starts_anew_each_time():
    class Folds(Tiny):
        def configure_retrieval(self, stage):
            return ImageTextRetrieval(recall_at=(2,), folds=5)

    model, data = Folds(), tiny_data()
    first = trainer().validate(model, datamodule=data, verbose=False)[0]
    assert "val/i2t_r2" in first
    assert trainer().validate(model, datamodule=data, verbose=False)[0] == first


class Counts(Tiny):
    """Count the rows that go through each encoder."""

    def setup(self, stage):
        self.rows = {"image": 0, "text": 0}

    def encode_image(self, image):
        self.rows["image"] += len(image)
        return super().encode_image(image)

    def encode_text(self, text):
        self.rows["text"] += len(text)
        return super().encode_text(text)


class Twice(Counts):
    """Encode each pair as it comes, by an ``embed`` of its own."""

    def embed(self, batch):
        return super().embed(batch)


def loader(pairs, batch_size, order=None):
    sampler = range(len(pairs)) if order is None else order
    return DataLoader(pairs.evaluation(), batch_size, sampler=sampler, collate_fn=collate_pairs)


class TestEachImageIsEncodedOnce:
    """Tiny's set has two texts per image, so that batches of odd sizes end between them."""

    @pytest.mark.parametrize("batch_size", [1, 3, 4, 46])
    def test_in_order_and_with_the_same_result(self, batch_size):
        torch.manual_seed(1)
        one, pairs = Counts(), tiny_pairs()
        other = Twice()
        other.load_state_dict(one.state_dict())
        results = [trainer().validate(model, loader(pairs, batch_size), verbose=False)[0] for model in (one, other)]
        assert one.rows == {"image": len(pairs.images), "text": len(pairs)}
        assert other.rows == {"image": len(pairs), "text": len(pairs)}
        assert results[0] == pytest.approx(results[1])

    def test_in_another_order(self):
        one, other, pairs = Counts(), Twice(), tiny_pairs()
        other.load_state_dict(one.state_dict())
        order = torch.randperm(len(pairs)).tolist()
        results = [trainer().validate(model, loader(pairs, 5, order), verbose=False)[0] for model in (one, other)]
        assert results[0] == pytest.approx(results[1])
        assert one.rows["image"] <= len(pairs)

    def test_several_loaders_and_again_with_other_weights(self):
        model, pairs = Counts(), tiny_pairs(5)
        loaders = [loader(pairs, 3), loader(pairs, 4)]
        for _ in range(2):
            trainer().validate(model, loaders, verbose=False)
            assert model.rows["image"] == 10
            torch.nn.init.normal_(model.image_encoder[1].weight)

    def test_a_part_of_the_batches(self):
        model, pairs = Counts(), tiny_pairs()
        L.Trainer(**SILENT, limit_val_batches=2).validate(model, loader(pairs, 6), verbose=False)
        assert model.rows == {"image": 6, "text": 12}

    def test_two_images_with_one_number_are_still_found_out(self):
        pairs = tiny_pairs().evaluation()
        batch = collate_pairs([pairs[0], {**pairs[20], "image_id": 0}])
        with pytest.raises(ValueError, match="Expected one embedding for each `image_id`, got two that differ"):
            trainer().validate(Counts(), DataLoader([batch], batch_size=None), verbose=False)

    def test_parts_in_train_mode_see_the_batch_as_it_comes(self):
        class Frozen(Counts):
            def on_validation_model_eval(self):
                super().on_validation_model_eval()
                self.image_encoder[2].train()

        model, pairs = Frozen(), tiny_pairs()
        trainer().validate(model, loader(pairs, 6), verbose=False)
        assert model.rows["image"] == len(pairs)

    def test_images_that_are_no_tensor(self):
        class Lists(Counts):
            def encode_image(self, image):
                return super().encode_image(torch.stack(list(image)))

        model = Lists()
        batches = [{**batch, "image": list(batch["image"])} for batch in loader(tiny_pairs(), 6)]
        trainer().validate(model, DataLoader(batches, batch_size=None), verbose=False)
        assert model.rows["image"] == 2 * NUM_IMAGES
