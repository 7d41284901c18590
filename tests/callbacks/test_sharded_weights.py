"""Weights that FSDP2 splits over two processes: what is mined and measured is what it is with DDP."""

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lightning_itm import GradientNormMonitor, InfoNCELoss, OfflineHardNegativeMining, TripletLoss
from tests.helpers.sharded import Keep, Split, fully_shard, in_two_processes, needs_fsdp2, train

TABLE = {"texts_per_image": 5, "images_per_text": 4, "batch_size": 7}
WAYS = {
    "samples": {"inject": "samples"},
    "embeddings": {"inject": "embeddings"},
    "batches": {"inject": "batches", "group_size": 2},
    "training": {"inject": "batches", "encode": "training", "group_size": 2},
    "split": {"inject": "batches", "split_embeddings": True, "group_size": 2},
}
pytestmark = [needs_fsdp2, pytest.mark.forks, pytest.mark.filterwarnings("ignore:Using `DistributedSampler`")]


def _mine(rank, way):
    for name in ("ddp", "fsdp2"):
        L.seed_everything(0, verbose=False)
        keep, model = Keep(), Split(InfoNCELoss())
        model.loss.logit_scale.data += rank  # what is not split must begin, and stay, as it is on rank 0
        model.image_encoder[2].running_mean += rank
        trainer, state = train(name, model, OfflineHardNegativeMining(**TABLE, **WAYS[way]), keep)
        metrics = {key: value for key, value in trainer.callback_metrics.items() if "seconds" not in key}
        torch.save((keep.tables, state, metrics), f"{name}-{rank}.pt")


@pytest.mark.parametrize(
    "way",
    ["embeddings", "training", *(pytest.param(way, marks=pytest.mark.slow) for way in ("samples", "batches", "split"))],
)
def test_mines_what_ddp_mines(way):
    in_two_processes(_mine, way)
    tables, state, metrics = torch.load("ddp-0.pt")
    first = 1 if way == "training" else 0  # which mines what the first epoch encoded
    assert (tables[first][0] >= 0).any()
    for rank in range(2):
        got = torch.load(f"fsdp2-{rank}.pt")
        assert all(torch.equal(one, other) for one, other in zip(tables[first], got[0][first], strict=True))
        assert got[1].keys() == state.keys()
        for key, value in state.items():
            torch.testing.assert_close(got[1][key], value, atol=1e-4, rtol=1e-4, msg=key)
        assert got[2].keys() == metrics.keys()
        for key in ("val/rsum", "mining/gap"):
            assert got[2][key] == pytest.approx(float(metrics[key]), rel=0.05), key


class Held(Split):
    """With weights that the module itself holds, and that its encoder must gather."""

    def __init__(self, *args):
        super().__init__(*args)
        self.projection = nn.Parameter(torch.randn(15, 15))

    def encode_image(self, image):
        return self.image_encoder(image) @ self.projection

    def towers(self):
        return {"image": self.image_encoder, "text": self.text_encoder, "all": self}

    def configure_model(self):
        super().configure_model()
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self, mesh=self.device_mesh["data_parallel"])


def _watch(rank):
    for name in ("ddp", "fsdp2"):
        L.seed_everything(0, verbose=False)
        monitor = GradientNormMonitor(0.9, 0.95, min_steps=2, smoothing=0.5)
        train(name, Held(TripletLoss(0.3)), monitor, accumulate_grad_batches=2)
        torch.save(monitor.curves(), f"{name}-{rank}.pt")


def test_measures_what_ddp_measures():
    in_two_processes(_watch)
    expected = torch.load("ddp-0.pt")
    assert len(expected["step"]) == 6
    assert min(expected["image_norm"] + expected["all_norm"]) > 0
    for rank in range(2):
        for name, values in torch.load(f"fsdp2-{rank}.pt").items():
            assert values == pytest.approx(expected[name], rel=1e-5), name


class Clipped(Split):
    """With one tower that is not split. It keeps the norms of the gradients before and after they are clipped."""

    def __init__(self, *args):
        super().__init__(*args)
        self.norms = []

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.image_encoder, mesh=self.device_mesh["data_parallel"])

    def configure_gradient_clipping(self, *args, **kwargs):
        before = self.whole_gradients()
        super().configure_gradient_clipping(*args, **kwargs)
        self.norms.append((before, self.whole_gradients()))

    def whole_gradients(self):
        gradients = (one.grad for one in self.parameters())
        return [(one.full_tensor() if hasattr(one, "full_tensor") else one).clone() for one in gradients]


def _clip(rank, algorithm, most):
    for name in ("ddp", "fsdp2"):
        L.seed_everything(0, verbose=False)
        model = Clipped(InfoNCELoss())
        train(name, model, gradient_clip_val=most, gradient_clip_algorithm=algorithm, max_epochs=1)
        torch.save(model.norms, f"{name}-{rank}.pt")


@pytest.mark.parametrize(("algorithm", "most"), [("norm", 0.05), ("value", 0.01)])
def test_clips_what_ddp_clips(algorithm, most):
    """In the first step, before which the weights are equal bit for bit."""
    in_two_processes(_clip, algorithm, most)
    before, after = torch.load("ddp-0.pt")[0]
    assert sum(one.norm() ** 2 for one in before) ** 0.5 > 2 * sum(one.norm() ** 2 for one in after) ** 0.5
    for rank in range(2):
        for step in zip(*torch.load(f"fsdp2-{rank}.pt")[0], before, after, strict=True):
            torch.testing.assert_close(step[0], step[2], atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(step[1], step[3], atol=1e-6, rtol=1e-4)


class Noisy(Split):
    """With dropout, so that the random streams of both ranks count."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.image_encoder.append(nn.Dropout(0.2))


def _resume(rank, way, strategy):
    for name, ckpt_path in (("whole", None), ("resumed", "whole/step=9.ckpt")):
        L.seed_everything(0 if ckpt_path is None else 1, verbose=False)
        mining, keep, monitor = OfflineHardNegativeMining(**TABLE, **WAYS[way]), Keep(), GradientNormMonitor()
        saving = ModelCheckpoint(name, "{step}", save_top_k=-1, every_n_train_steps=3)
        options = {"enable_checkpointing": True, "max_epochs": 3, "ckpt_path": ckpt_path, "num_workers": 1}
        model = Noisy(TripletLoss(0.3))
        _, state = train(strategy, model, mining, keep, monitor, saving, **options)
        torch.save((keep.tables[-1], state, monitor.curves()), f"{name}-{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "strategy"), [("embeddings", "fsdp2"), ("training", "fsdp2"), ("embeddings", "fsdp2 in one file")]
)
def test_goes_on_where_it_stopped(way, strategy):
    """In the middle of the second epoch: weights and curves bit for bit."""
    in_two_processes(_resume, way, strategy)
    assert Path("whole/step=9.ckpt").is_dir() == (strategy == "fsdp2")
    for rank in range(2):
        (table, state, curves), (their_table, their_state, their_curves) = (
            torch.load(f"{name}-{rank}.pt") for name in ("whole", "resumed")
        )
        assert all(torch.equal(one, other) for one, other in zip(table, their_table, strict=True))
        assert all(torch.equal(value, their_state[key]) for key, value in state.items())
        assert curves == their_curves
