"""Every loss with every combination of callbacks: the host waits for nothing, and compiled towers stay compiled."""

import json

import open_clip
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile

from lightning_itm import (
    FalseNegativeElimination,
    FalseNegativeSampler,
    GradientNormMonitor,
    ImageTextDataModule,
    ImageTextDataset,
    InfoNCELoss,
    OfflineHardNegativeMining,
    OpenCLIPDualEncoder,
    QuintupletLoss,
    SigmoidLoss,
    TripletLoss,
)
from tests.compilation import needs_compiler
from tests.helpers.fit import fit
from tests.helpers.pictures import captions, cut_outs
from tests.helpers.tiny import AUGMENTED, Tiny, tiny_data, tokenize

LOSSES = {
    "hardest": TripletLoss,
    "selective": lambda: TripletLoss(negatives="selective"),
    "mean": lambda: TripletLoss(negatives="mean"),
    "quintuplet": QuintupletLoss,
    "info_nce": InfoNCELoss,
    "hardness": lambda: InfoNCELoss(hardness=9),
    "sigmoid": SigmoidLoss,
}
CALLBACKS = {
    "memory": lambda: FalseNegativeElimination(
        16, momentum=0.9, start_epoch=0, sampler=FalseNegativeSampler(min_count=4)
    ),
    "mining": lambda: OfflineHardNegativeMining(
        texts_per_image=12, images_per_text=8, inject="embeddings", batch_size=16, num_workers=0
    ),
    "samples": lambda: OfflineHardNegativeMining(texts_per_image=12, images_per_text=8, batch_size=16, num_workers=0),
    "batches": lambda: OfflineHardNegativeMining(
        texts_per_image=12, images_per_text=8, inject="batches", encode="training", group_size=2
    ),
    "monitor": GradientNormMonitor,
}
COMBINATIONS = [(), ("memory",), ("mining",), ("batches",), ("memory", "mining")]
# Only hinges that have a selective rule can be switched.
CASES = [(loss, names) for loss in LOSSES for names in COMBINATIONS if (loss, names) != ("sigmoid", ("batches",))] + [
    (loss, (*names, "monitor")) for loss in ("hardest", "selective", "quintuplet") for names in COMBINATIONS
]
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}
LEAF = "ignore:The .grad attribute of a Tensor that is not a leaf"  # dynamo looks at it itself
GPU = {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed"}


class Watched(Callback):
    """Enter before the second epoch's third batch and leave after its fifth: first of the callbacks, so that it sees all."""

    def __init__(self, enter, leave):
        self.enter, self.leave, self.num_steps = enter, leave, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 2:
            self.enter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1:
            self.num_steps += 1
            if batch_idx == 6:
                self.leave()


class Plain(Tiny):
    def configure_optimizers(self):  # AdamW reads its own count of steps, which is on the CPU
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("loss", "names"), CASES, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
def test_the_host_reads_nothing(loss, names):
    check_no_read(loss, names, tiny_data(num_workers=1))


@pytest.mark.filterwarnings("ignore:46 of 46 pairs share their caption")
@pytest.mark.parametrize("loss", ["selective", "quintuplet", "sigmoid"])
def test_the_host_reads_nothing_with_equal_captions(loss):
    data = tiny_data(num_workers=1)
    texts = [[f"kind {i % 5}", f"sort {i % 7}"] for i in range(23)]
    data.train_dataset = ImageTextDataset(cut_outs(23), texts, transform=AUGMENTED, tokenizer=tokenize)
    check_no_read(loss, ("memory", "mining"), data)
    assert "caption_id" in data.train_dataset[0]


def check_no_read(loss, names, data):
    recorder = profile(activities=[ProfilerActivity.CPU])
    watched = Watched(recorder.__enter__, lambda: recorder.__exit__(None, None, None))
    callbacks = [watched, *(CALLBACKS[name]() for name in names)]
    fit(Plain(LOSSES[loss]()), data, *callbacks, limit_val_batches=0)
    keys = {event.key for event in recorder.key_averages()}
    assert watched.num_steps == 12
    assert "aten::mm" in keys
    assert keys & WAITS == set()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("loss", "names"), CASES, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
def test_no_step_waits_for_the_device(loss, names):
    fit_without_waiting(names, Tiny(LOSSES[loss]()), tiny_data(num_workers=1))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.filterwarnings(LEAF)
@pytest.mark.parametrize("loss", LOSSES)
@needs_compiler
def test_no_step_of_compiled_towers_waits_for_the_device(loss, tiny_flat):
    names = next(names for of_loss, names in reversed(CASES) if of_loss == loss)  # the most callbacks
    model = OpenCLIPDualEncoder("tiny-flat", loss=LOSSES[loss](), learning_rate=1e-3, warmup_steps=0, compile=True)
    fit_without_waiting(names, model, open_clip_data(model, num_workers=1))


def fit_without_waiting(names, model, data):
    """With AdamW, and workers that load: pages that are not pinned would wait, too."""
    watched = Watched(
        lambda: torch.cuda.set_sync_debug_mode("error"), lambda: torch.cuda.set_sync_debug_mode("default")
    )
    callbacks = [watched, *(CALLBACKS[name]() for name in names)]
    try:
        fit(model, data, *callbacks, limit_val_batches=0, **GPU)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watched.num_steps >= 7


class Encoded(Tiny):
    """Call ``enter`` before the second batch of texts that mining encodes, and ``leave`` before the last."""

    def __init__(self, enter, leave):
        super().__init__(QuintupletLoss(), warmup_steps=0)
        self.calls, self.hooks = 0, (enter, leave)

    def encode_text(self, text):
        if not self.training:
            self.calls += 1
            if self.calls in (2, 11):
                self.hooks[self.calls == 11]()
        return super().encode_text(text)


def mine(model, **options):
    mining = OfflineHardNegativeMining(
        texts_per_image=12, images_per_text=8, inject="embeddings", batch_size=4, num_workers=1
    )
    fit(model, None, mining, max_epochs=1, limit_train_batches=1, limit_val_batches=0, **options)
    assert model.calls == 12


def test_the_host_reads_nothing_while_mining_encodes():
    recorder = profile(activities=[ProfilerActivity.CPU])
    mine(Encoded(recorder.__enter__, lambda: recorder.__exit__(None, None, None)))
    keys = {event.key for event in recorder.key_averages()}
    assert "aten::embedding_bag" in keys
    assert keys & WAITS == set()


@pytest.mark.gpu
def test_mining_waits_for_no_batch_that_it_encodes():
    modes = (lambda mode=mode: torch.cuda.set_sync_debug_mode(mode) for mode in ("error", "default"))
    try:
        mine(Encoded(*modes), **GPU)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_loaders_pin_what_they_load():
    data = tiny_data()
    for loader in (data.train_dataloader(), data.val_dataloader(), *data.predict_dataloader()):
        batch = next(iter(loader))
        assert all(value.is_pinned() for value in batch.values() if isinstance(value, torch.Tensor))


@pytest.fixture
def tiny_flat(tmp_path):
    """A small open_clip model: one layer a tower, compiled sooner."""
    tower = {"width": 32, "layers": 1}
    config = {
        "embed_dim": 24,
        "vision_cfg": {**tower, "image_size": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {**tower, "context_length": 16, "vocab_size": 49408, "heads": 2},
    }
    (tmp_path / "tiny-flat.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-flat.json")


def open_clip_data(model, **kwargs):
    """Twenty-three images of two texts: mining's last batches are smaller than the others."""
    pairs = ImageTextDataset(cut_outs(23, 40), captions(23), **model.transforms)
    return ImageTextDataModule(pairs, pairs, **{"batch_size": 4, "num_workers": 0, **kwargs})


class CountGraphs(Callback):
    """The number of compiled graphs after each epoch, its validation and the mining after it. Stands last."""

    def __init__(self):
        self.after = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0 and trainer.current_epoch > 0:
            self.after.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        if trainer.current_epoch == 2:
            torch._dynamo.config.error_on_recompile = True


def trace_only(model):
    """Compile the same modules again, without generated code.

    Dynamo, which runs here as ever, decides alone when a graph is compiled anew. The code of its default backend plays no
    part in that, and a C++ compiler needs minutes for it.
    """
    modules = [module for module in model.modules() if module._compiled_call_impl is not None]
    assert modules
    for module in modules:
        module.compile(backend="aot_eager")


THREE = pytest.mark.parametrize(
    "names", [("memory", "mining", "monitor"), ("memory", "samples", "monitor")], ids="+".join
)


@pytest.mark.slow
@pytest.mark.filterwarnings(LEAF)
@THREE
def test_compiled_towers_are_not_compiled_again_in_later_epochs(names, tiny_flat):
    check_graphs(names, trace_only)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.filterwarnings(LEAF)
@THREE
@needs_compiler
def test_compiled_towers_are_not_compiled_again_on_a_gpu(names, tiny_flat):
    check_graphs(names, **GPU)


def check_graphs(names, prepare=lambda model: None, **options):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = OpenCLIPDualEncoder("tiny-flat", loss=QuintupletLoss(), learning_rate=1e-3, warmup_steps=0, compile=True)
    prepare(model)
    graphs = CountGraphs()
    callbacks = [*(CALLBACKS[name]() for name in names), graphs]
    try:
        run = fit(model, open_clip_data(model), *callbacks, max_epochs=5, num_sanity_val_steps=0, **options)
    finally:
        torch._dynamo.config.error_on_recompile = False
    assert graphs.after[0] > 0
    assert graphs.after[1:] == [graphs.after[1]] * 3
    assert run.trainer.current_epoch == 5
