"""Two processes that split the weights with FSDP2, through Lightning's strategy, and DDP to compare with."""

import os

import lightning as L
import pytest
import torch
import torch.distributed.fsdp
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from tests.helpers.tiny import SILENT, Tiny, tiny_data

fully_shard = getattr(torch.distributed.fsdp, "fully_shard", None)
needs_fsdp2 = pytest.mark.skipif(fully_shard is None, reason="FSDP2 has its public name from torch 2.6 on")


class Split(Tiny):
    """Without dropout and noise. Of the 15 rows of each weight, one rank gets one less than the other."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, warmup_steps=0, **kwargs)
        self.image_encoder = nn.Sequential(nn.Flatten(), nn.Linear(768, 15), nn.BatchNorm1d(15))
        self.text_encoder = nn.Sequential(nn.EmbeddingBag(256, 16), nn.Linear(16, 15))

    def encode_image(self, image):
        return self.image_encoder(image)

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for tower in (self.image_encoder, self.text_encoder):
                fully_shard(tower, mesh=self.device_mesh["data_parallel"])


def in_two_processes(function, *args):
    """Call ``function(rank, *args)`` in two processes that Lightning, or a process group of theirs, can connect."""
    context, port = torch.multiprocessing.get_context("fork"), str(find_free_network_port())
    processes = [context.Process(target=_call, args=(rank, port, function, args)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0], codes


def _call(rank, port, function, args):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, LOCAL_RANK=str(rank), RANK=str(rank), NODE_RANK="0")
    function(rank, *args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def strategy(name):
    """``"ddp"``, ``"fsdp2"``, or ``"fsdp2 in one file"``, whose checkpoints are no folders."""
    options = {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": name == "fsdp2"}
    return name if name == "ddp" else ModelParallelStrategy(**options)


class Keep(Callback):
    """Keep what was mined for each epoch."""

    def __init__(self):
        self.tables = []

    def on_train_epoch_start(self, trainer, pl_module):
        table = trainer.callbacks[0].table
        self.tables.append((table.texts.clone(), table.images.clone()))


def train(name, model, *callbacks, ckpt_path=None, num_workers=0, **options):
    """Fit in one of the two processes, with the strategy of this name. Return the Trainer and the whole weights."""
    options = {**SILENT, "max_epochs": 2, "num_sanity_val_steps": 0, **options}
    trainer = L.Trainer(devices=2, strategy=strategy(name), callbacks=list(callbacks), **options)
    trainer.fit(model, datamodule=tiny_data(num_workers=num_workers), ckpt_path=ckpt_path)
    return trainer, weights(model)


def weights(model):
    """The state of a model, whole on each rank."""
    return {
        key: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        for key, value in model.state_dict().items()
    }
