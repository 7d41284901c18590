import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_itm import ImageTextRetrieval
from lightning_itm.data import collate_pairs
from tests.helpers.tiny import SILENT, Tiny, tiny_data, tiny_pairs


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
