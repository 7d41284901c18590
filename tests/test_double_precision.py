"""Runs in float64, in which the stored embeddings of every source meet live ones."""

import pytest
import torch

from lightning_itm import (
    FalseNegativeElimination,
    FalseNegativeSampler,
    InfoNCELoss,
    OfflineHardNegativeMining,
    QuintupletLoss,
    SigmoidLoss,
    TripletLoss,
)
from tests.helpers.fit import fit
from tests.helpers.tiny import Tiny

MINING = {
    "samples": {"inject": "samples"},
    "embeddings": {"inject": "embeddings"},
    "batches": {"inject": "batches", "group_size": 2},
    "batches of training embeddings": {"inject": "batches", "group_size": 2, "encode": "training"},
}


@pytest.mark.parametrize(
    "mining", [pytest.param(name, marks=[] if name == "embeddings" else pytest.mark.slow) for name in MINING]
)
@pytest.mark.parametrize("loss", [TripletLoss, QuintupletLoss, InfoNCELoss, SigmoidLoss])
def test_memory_bank_and_mining(loss, mining):
    if loss is SigmoidLoss and "batches" in mining:
        pytest.skip("the loss refuses hard batches")
    bank = FalseNegativeElimination(16, start_epoch=0, sampler=FalseNegativeSampler(min_count=2))
    miner = OfflineHardNegativeMining(texts_per_image=6, images_per_text=4, **MINING[mining])
    run = fit(Tiny(loss()), None, bank, miner, precision="64-true")
    assert all(value.dtype == torch.float64 for value in run.module.state_dict().values() if value.is_floating_point())
    assert run.trainer.global_step == 24
    assert torch.isfinite(run.trainer.callback_metrics["train/loss"])
