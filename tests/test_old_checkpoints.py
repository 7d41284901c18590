"""A checkpoint of an older version, of a run with every callback, resumes and ends as that run did."""

import csv

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor

from lightning_itm import ImageTextFilesDataModule
from tests.fixtures.make_checkpoint import (
    EPOCHS,
    FOLDER,
    MODES,
    OPTIONS,
    STEPS_PER_EPOCH,
    STOP,
    Model,
    SaveAt,
    as_tensor,
    run_to_end,
    tokenize,
)
from tests.helpers.fit import fit

# The run is float64, and a perturbation of its weights by one part in 10^12 grows to 3e-11 at its end. What the mining pass
# embeds, and what the monitor averages, is float32: rounded by 1.2e-7, which grows alike to 3e-6.
TOLERANCE = {"samples": 1e-9, "embeddings": 1e-5}
FLOAT32_TOLERANCE = 1e-5


def flatten(tree, path=""):
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from flatten(value, f"{path}/{key}")
    else:
        yield path, tree


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("mode", MODES)
def test_resumes_and_ends_alike(mode):
    assert STOP % STEPS_PER_EPOCH > 0
    assert STOP < STEPS_PER_EPOCH * EPOCHS
    expected = dict(flatten(torch.load(FOLDER / f"{mode}-end.ckpt", weights_only=True)))
    found = dict(flatten(run_to_end(mode, resume_from=FOLDER / f"{mode}.ckpt")))
    assert found.keys() >= expected.keys()  # what later versions keep beside
    for name, value in expected.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            tolerance = TOLERANCE[mode] if value.dtype == torch.float64 else FLOAT32_TOLERANCE
            torch.testing.assert_close(
                found[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )
        elif isinstance(value, Tensor):
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name


@pytest.mark.parametrize("mode", MODES)
def test_checks_something(mode):
    """The end is far from the stop, and what the callbacks keep differs, too."""
    start = dict(flatten(torch.load(FOLDER / f"{mode}.ckpt", weights_only=True)))
    end = dict(flatten(torch.load(FOLDER / f"{mode}-end.ckpt", weights_only=True)))
    for name in (
        "/state_dict/text_encoder.weight",
        "/state_dict/image_encoder.1.running_mean",
        "/false_negative_elimination/encoder/text_encoder.weight",
        "/false_negative_elimination/bank/image",
        "/callbacks/GradientNormMonitor/switch/size",
    ):
        assert float((start[name] - end[name]).abs().max()) > 1e-3, name
    assert not torch.equal(
        start["/callbacks/OfflineHardNegativeMining/texts"], end["/callbacks/OfflineHardNegativeMining/texts"]
    )


class ModelWithTransforms(Model):
    @property
    def transforms(self):
        return {"transform": as_tensor, "eval_transform": as_tensor, "tokenizer": tokenize}


class Watch(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((trainer.current_epoch, batch_idx, batch["text_id"].tolist()))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_datamodule_under_its_earlier_name(tmp_path):
    with open(tmp_path / "train.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "text"])
        for i in range(24):
            Image.new("RGB", (2, 2), (i, 2 * i, 3 * i)).save(tmp_path / f"{i}.png")
            writer.writerow([f"{i}.png", f"picture {i}"])

    def run(*callbacks, **options):
        watch = Watch()
        data = ImageTextFilesDataModule(str(tmp_path / "train.csv"), batch_size=4, num_workers=0)
        fit(ModelWithTransforms, data, watch, *callbacks, **OPTIONS, **options)
        return watch.seen

    seen = run(SaveAt(tmp_path / "stop.ckpt"))
    checkpoint = torch.load(tmp_path / "stop.ckpt", weights_only=True)
    checkpoint["ImageTextFiles"] = checkpoint.pop("ImageTextFilesDataModule")
    torch.save(checkpoint, tmp_path / "older.ckpt")
    assert run(resume_from=tmp_path / "older.ckpt") == seen[STOP:]
