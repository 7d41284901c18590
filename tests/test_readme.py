"""What the README shows, run as it stands there."""

import re
import shlex
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest

from lightning_itm import ImageTextDataModule
from lightning_itm.cli import main
from tests.helpers.documented import small_model, write_flickr30k
from tests.helpers.open_clip_models import CONFIGS, register
from tests.helpers.pictures import cut_outs
from tests.helpers.tiny import SILENT, tiny_pairs

README = (Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = re.findall(r"^\.venv/bin/lightning-itm (.*)$", README, flags=re.MULTILINE)


@pytest.fixture
def flickr30k(tmp_path):
    write_flickr30k(tmp_path)


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
@pytest.mark.usefixtures("flickr30k")
def test_first_snippets(tmp_path):
    """No weights can be downloaded here, and ViT-B/32 takes a minute a step: a small model stands in, nothing else."""
    register({"tiny-vit": CONFIGS["tiny-vit"]}, tmp_path)
    code = small_model(SNIPPETS[0])
    assert code != SNIPPETS[0]
    names = {}
    exec(code, names)
    assert names["trainer"].global_step == 5
    assert 0 <= names["trainer"].callback_metrics["val/rsum"] <= 600
    exec(SNIPPETS[1], names)
    assert names["trainer"].global_step == 1
    assert len(names["pairs"]) == 160
    exec(SNIPPETS[2], names)
    assert names["trainer"].callback_metrics["mining/gap"] < 2
    assert (tmp_path / "mined.png").stat().st_size > 10_000
    exec(SNIPPETS[3], names)
    assert names["trainer"].callback_metrics["mining/grouped_share"] > 0.5
    exec(SNIPPETS[4], names)
    assert set(names["monitor"].curves()["selective"]) <= {0, 1}
    assert (tmp_path / "gradients.png").stat().st_size > 10_000
    exec(SNIPPETS[5], names)
    assert names["memory"].bank.valid.any()
    assert (tmp_path / "memory.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")  # of Lightning's CLI
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:`train` and `val` are the same, FOLDER")
@pytest.mark.filterwarnings("ignore:The run has 10 optimizer steps and `warmup_steps=200`")
@pytest.mark.usefixtures("flickr30k")
def test_commands(tmp_path, monkeypatch):
    """Every command line, one after the other, of a small model in float32 on the small set, and nothing else changed."""
    monkeypatch.setattr(sys, "argv", ["lightning-itm"])
    register({"tiny-vit": CONFIGS["tiny-vit"]}, tmp_path)
    (tmp_path / "examples").symlink_to(Path(__file__).parents[1] / "examples")
    (tmp_path / "FOLDER").mkdir()
    for number, image in enumerate(cut_outs(20, 40)):
        image.save(tmp_path / "FOLDER" / f"{number}.png")
        (tmp_path / "FOLDER" / f"{number}.txt").write_text(f"square {number}\nand square {number} again\n")
    small = ["--model.model_name", "tiny-vit", "--data.batch_size", "16", "--data.num_workers", "0"]
    small += [
        "--trainer.accelerator",
        "cpu",
        "--trainer.precision",
        "32-true",
        "--trainer.enable_progress_bar",
        "false",
    ]
    assert len(COMMANDS) == 6
    for command in COMMANDS:
        given = shlex.split(command, comments=True)
        from_config = ["--model.pretrained", "null", "--trainer.max_epochs", "1"] if "--config" in given else []
        main(given if given[0] == "shards" else [*given, *small, *from_config])
    assert np.load("embeddings/text.npy").shape[0] == len(Path("embeddings/texts.jsonl").read_text().splitlines())
    assert len(Path("mined/texts_of_images.jsonl").read_text().splitlines()) == 32
    assert (tmp_path / "runs" / "flickr30k" / "best.ckpt").is_file()


def test_own_encoder_in_ten_lines():
    names = {}
    exec(SNIPPETS[6], names)
    assert len([line for line in SNIPPETS[6].split("class MyEncoder")[1].splitlines() if line.strip()]) <= 10
    model = names["MyEncoder"](image_dim=768, learning_rate=1e-3)
    data = ImageTextDataModule(tiny_pairs(), tiny_pairs(), batch_size=8, num_workers=0)
    trainer = L.Trainer(max_epochs=2, **SILENT)
    trainer.fit(model, datamodule=data)
    assert "val/rsum" in trainer.callback_metrics
