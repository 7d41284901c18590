"""What the README shows, run as it stands there."""

import json
import re
from pathlib import Path

import lightning as L
import open_clip
import pytest

from lightning_itm import ImageTextDataModule
from tests.modules.test_open_clip import CONFIGS
from tests.pictures import cut_outs
from tests.tiny import SILENT, tiny_pairs

README = (Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def flickr30k(tmp_path):
    """A set in the layout of Flickr30K, of cut-outs."""
    (tmp_path / "flickr30k-images").mkdir()
    entries = []
    for number, image in enumerate(cut_outs(40, 40)):
        image.save(tmp_path / "flickr30k-images" / f"{number}.png")
        sentences = [{"raw": f"square {number} for the {place}th time"} for place in range(5)]
        split = "val" if number < 8 else "train"
        entries.append({"filename": f"{number}.png", "split": split, "sentences": sentences})
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": entries}))


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
@pytest.mark.usefixtures("flickr30k")
def test_first_snippets(tmp_path):
    """No weights can be downloaded here, and ViT-B/32 takes a minute a step: a small model stands in, nothing else."""
    (tmp_path / "tiny-vit.json").write_text(json.dumps(CONFIGS["tiny-vit"]))
    open_clip.add_model_config(tmp_path / "tiny-vit.json")
    code = SNIPPETS[0].replace('"ViT-B-32", pretrained="laion2b_s34b_b79k"', '"tiny-vit"')
    assert code != SNIPPETS[0]
    names = {}
    exec(code, names)
    assert names["trainer"].global_step == 5
    assert 0 <= names["trainer"].callback_metrics["val/rsum"] <= 600
    exec(SNIPPETS[1], names)
    assert names["trainer"].callback_metrics["mining/gap"] < 2
    assert (tmp_path / "mined.png").stat().st_size > 10_000
    exec(SNIPPETS[2], names)
    assert set(names["monitor"].curves()["selective"]) <= {0, 1}
    assert (tmp_path / "gradients.png").stat().st_size > 10_000
    exec(SNIPPETS[3], names)
    assert names["memory"].bank.valid.any()
    assert (tmp_path / "memory.png").stat().st_size > 10_000


def test_own_encoder_in_ten_lines():
    names = {}
    exec(SNIPPETS[4], names)
    assert len([line for line in SNIPPETS[4].split("class MyEncoder")[1].splitlines() if line.strip()]) <= 10
    model = names["MyEncoder"](image_dim=768, learning_rate=1e-3)
    data = ImageTextDataModule(tiny_pairs(), tiny_pairs(), batch_size=8, num_workers=0)
    trainer = L.Trainer(max_epochs=2, **SILENT)
    trainer.fit(model, datamodule=data)
    assert "val/rsum" in trainer.callback_metrics
