"""The recipes of the papers, each on a small set in the layout it asks for."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.open_clip_models import CONFIGS, register
from tests.helpers.pictures import cut_outs

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The run has .* optimizer steps and `warmup_steps=100`"),
    pytest.mark.filterwarnings("ignore:.*`lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)`"),
]


def load_papers():
    path = Path(__file__).parents[2] / "examples" / "papers.py"
    spec = importlib.util.spec_from_file_location("papers", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["papers"] = module
    spec.loader.exec_module(module)
    return module


def write_features(folder):
    generator = np.random.default_rng(0)
    for split, number in (("train", 40), ("dev", 10), ("test", 10)):
        repeats = 1 if split == "train" else 5
        rows = generator.standard_normal((number, 6, 16)).astype(np.float16).repeat(repeats, axis=0)
        np.save(folder / f"{split}_ims.npy", rows)
        lines = [f"a picture of thing {i % 7}, number {place}." for i in range(number) for place in range(5)]
        (folder / f"{split}_caps.txt").write_text("\n".join(lines))


@pytest.mark.parametrize("arguments", [["rvse"], ["rvse", "--monitor"], ["aoq"]], ids=" ".join)
def test_on_region_features(arguments, tmp_path):
    write_features(tmp_path)
    more = ["--data", str(tmp_path), "--embed-dim", "16", "--batch-size", "32", "--epochs", "2", "--num-workers", "0"]
    metrics = load_papers().main([*arguments, *more, "--accelerator", "cpu", "--out", str(tmp_path / "out")])
    assert 0 <= metrics["test/rsum"] <= 600
    assert list((tmp_path / "out" / arguments[0]).glob("*.ckpt"))


def test_on_images(tmp_path):
    entries = []
    for number, image in enumerate(cut_outs(24, 40)):
        image.save(tmp_path / f"{number}.png")
        sentences = [{"raw": f"square {number} for the {place}th time"} for place in range(5)]
        split = {0: "val", 1: "test"}.get(number % 6, "train")
        entries.append({"filename": f"{number}.png", "split": split, "sentences": sentences})
    (tmp_path / "dataset.json").write_text(json.dumps({"images": entries}))
    register({"tiny-vit": CONFIGS["tiny-vit"]}, tmp_path)
    arguments = [
        "fne",
        "--data",
        str(tmp_path / "dataset.json"),
        "--images",
        str(tmp_path),
        "--model",
        "tiny-vit",
        "--pretrained",
        "",
    ]
    more = [
        "--batch-size",
        "32",
        "--epochs",
        "2",
        "--num-workers",
        "0",
        "--accelerator",
        "cpu",
        "--out",
        str(tmp_path / "out"),
    ]
    assert 0 <= load_papers().main([*arguments, *more])["test/rsum"] <= 600
