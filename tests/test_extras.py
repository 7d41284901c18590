"""What is optional is not needed before it is used, and then its extra is named. ``nox -s bare`` runs this without them."""

import os
import subprocess
import sys

import pytest

OPTIONAL = (
    "transformers",
    "peft",
    "faiss",
    "datasets",
    "onnx",
    "onnxscript",
    "eccv_caption",
    "pyarrow",
    "matplotlib",
    "tensorboard",
)
# A process in which they can't be found, as if they were not installed.
HIDE = f"""
import sys
from importlib import metadata
from importlib.machinery import PathFinder

class Visible(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {OPTIONAL!r} else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Visible
find = metadata.Distribution.from_name

def from_name(name):  # others look here for what is installed
    if name.replace("-", "_") in {OPTIONAL!r}:
        raise metadata.PackageNotFoundError(name)
    return find(name)

metadata.Distribution.from_name = from_name
"""
USES = {
    "hf": ("transformers", "from lightning_itm import HFDualEncoder\nHFDualEncoder('some/model')"),
    "lora": (
        "peft",
        "from lightning_itm.models.pretrained.lora import import_peft\nimport_peft()",
    ),
    "faiss": (
        "faiss",
        "from lightning_itm import OfflineHardNegativeMining\nOfflineHardNegativeMining(search='faiss')",
    ),
    "datasets": ("datasets", "from lightning_itm import ImageTextDataset\nImageTextDataset.from_huggingface([])"),
    "onnx": (
        "onnx",
        "import torch\nfrom lightning_itm.export import export_onnx\nexport_onnx(torch.nn.Linear(2, 2), 'out')",
    ),
    "parquet": ("pyarrow", "from lightning_itm import NegativeWriter\nNegativeWriter('out', format='parquet')"),
}


def run(code):
    command = [sys.executable, "-c", HIDE + code]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_package_and_its_command_need_none_of_them():
    """A small model trains, too."""
    code = """
import lightning as L
import numpy as np
import torch
from torch import nn
import lightning_itm, lightning_itm.cli
from lightning_itm import DualEncoder, ImageTextDataModule, ImageTextDataset, OfflineHardNegativeMining

class Own(DualEncoder):
    def __init__(self):
        super().__init__(warmup_steps=0)
        self.image_encoder, self.text_encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 4)), nn.Linear(2, 4)
    def encode_image(self, image): return self.image_encoder(image)
    def encode_text(self, text): return self.text_encoder(text)

tokenize = lambda texts: torch.tensor([[len(text), ord(text[0])] for text in texts]).float()
images = [np.full((4, 4, 3), 30 * number, np.uint8) for number in range(8)]
pairs = ImageTextDataset(images, list("abcdefgh"), tokenizer=tokenize)
trainer = L.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
                    callbacks=[OfflineHardNegativeMining(texts_per_image=2, images_per_text=2)])
trainer.fit(Own(), datamodule=ImageTextDataModule(pairs, pairs, batch_size=4, num_workers=0))
assert trainer.global_step == 4
"""
    done = run(code)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("extra", USES)
def test_the_first_use_names_the_extra(extra):
    module, code = USES[extra]
    done = run(code)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert f"lightning_itm[{extra}]" in last, done.stderr[-2000:]
    assert module in last
