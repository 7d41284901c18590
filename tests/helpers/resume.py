"""Runs that stop, are killed and go on, and a record of the pairs that they saw."""

import os
import signal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_itm import (
    FalseNegativeElimination,
    FalseNegativeSampler,
    OfflineHardNegativeMining,
    ShardDataset,
    ShardStream,
)
from tests.helpers.tiny import AUGMENTED, NUM_IMAGES, PLAIN, SILENT, Tiny, tiny_data, tokenize

NUM_PAIRS = 2 * NUM_IMAGES
STEPS = -(-NUM_PAIRS // 4)  # batches of four, the last of two
EPOCHS = 3


class PlainOptimizer(Tiny):
    """Without `trainer.estimated_stepping_batches`, which makes the train loader earlier than it would be."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Watch(Callback):
    """Record the pairs that reach each step, and kill the process at one of them."""

    def __init__(self, kill_at=None):
        self.kill_at, self.seen = kill_at, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        hard, mined = batch.get("hard"), []
        if isinstance(hard, dict):
            mined = [hard["image_id_of_text"].tolist(), hard["image_id"].tolist()]
        if "memory" in batch:
            memory = batch["memory"]
            mined.append((memory.image_id.tolist(), memory.valid.tolist(), memory.image_embeddings.sum().item()))
        pairs = batch["text_id"].tolist()
        self.seen.append((trainer.current_epoch, batch_idx, pairs, batch["image"].sum().item(), *mined))


def fit(
    model_class,
    loader,
    folder=".",
    *,
    save=None,
    kill_at=None,
    resume_from=None,
    seed=0,
    mining=None,
    memory=None,
    callbacks=(),
    **trainer_options,
):
    L.seed_everything(seed, verbose=False)
    watch, checkpoint = Watch(kill_at), ModelCheckpoint(folder, "{step}", save_top_k=-1, **(save or {}))
    options = {**SILENT, "max_epochs": EPOCHS, "enable_checkpointing": True, **trainer_options}
    model = model_class()
    miners = [] if mining is None else [OfflineHardNegativeMining(texts_per_image=12, images_per_text=8, **mining)]
    banks = []
    if memory is not None:
        memory = dict(memory)
        sampler = FalseNegativeSampler(posterior=memory.pop("posterior", "histogram"), min_count=4)
        banks.append(FalseNegativeElimination(16, **memory, sampler=sampler))
    trainer = L.Trainer(callbacks=[*banks, watch, *miners, *callbacks, checkpoint], **options)
    data = tiny_data(**{name: value for name, value in loader.items() if name != "shards"})
    if "shards" in loader:
        transforms = {"transform": AUGMENTED, "eval_transform": PLAIN, "tokenizer": tokenize}
        data.train_dataset = ShardStream(ShardDataset(loader["shards"], **transforms), shuffle_buffer=9)
    trainer.fit(model, datamodule=data, ckpt_path=resume_from, weights_only=True)
    return model.state_dict(), watch.seen
