"""The command line, as a user would call it, on a small data set in Karpathy's format."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import open_clip
import pytest
import torch
import yaml

import lightning_itm as itm
from lightning_itm.cli import main
from tests.helpers.karpathy import write_karpathy

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),  # of Lightning's CLI
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


@pytest.fixture(autouse=True)
def _small_model(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["lightning-itm"]
    )  # Lightning compares what it is given with the real command line
    open_clip.add_model_config(EXAMPLES / "models" / "emoji-clip.json")


@pytest.fixture
def config(tmp_path):
    """A YAML with a loss and every callback by class path, and two epochs on twelve images."""
    write_karpathy(tmp_path)
    values = {
        "seed_everything": 3,
        "model": {
            "class_path": "lightning_itm.OpenCLIPDualEncoder",
            "init_args": {
                "model_name": "emoji-clip",
                "learning_rate": 1e-4,
                "augmentation": {"scale": [0.5, 1.0]},
                "loss": {
                    "class_path": "lightning_itm.QuintupletLoss",
                    "init_args": {
                        "online": {"class_path": "lightning_itm.TripletLoss", "init_args": {"negatives": "selective"}}
                    },
                },
            },
        },
        "data": {
            "class_path": "lightning_itm.ImageTextFilesDataModule",
            "init_args": {
                **dict.fromkeys(("train", "val", "test"), "dataset.json"),
                "batch_size": 12,
                "num_workers": 0,
                "seed": 3,
            },
        },
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {
                    "class_path": "lightning_itm.OfflineHardNegativeMining",
                    "init_args": {"texts_per_image": 6, "images_per_text": 4},
                },
                {
                    "class_path": "lightning_itm.FalseNegativeElimination",
                    "init_args": {
                        "queue_size": 24,
                        "sampler": {"class_path": "lightning_itm.FalseNegativeSampler", "init_args": {"min_count": 4}},
                    },
                },
                {"class_path": "lightning_itm.GradientNormMonitor"},
            ],
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def checkpoint():
    (path,) = Path("lightning_logs").glob("version_0/checkpoints/*.ckpt")
    return path


@pytest.mark.slow
def test_a_run_from_yaml_equals_the_same_run_from_python(config):
    main(["fit", "--config", str(config)])
    found = torch.load(checkpoint(), weights_only=True)["state_dict"]

    L.seed_everything(3, workers=True, verbose=False)
    model = itm.OpenCLIPDualEncoder(
        "emoji-clip",
        loss=itm.QuintupletLoss(itm.TripletLoss(negatives="selective")),
        learning_rate=1e-4,
        augmentation={"scale": [0.5, 1.0]},
    )
    pairs = [
        itm.ImageTextDataset.from_karpathy("dataset.json", ".", split, **model.transforms) for split in ("train", "val")
    ]
    callbacks = [
        itm.OfflineHardNegativeMining(texts_per_image=6, images_per_text=4),
        itm.FalseNegativeElimination(24, sampler=itm.FalseNegativeSampler(min_count=4)),
        itm.GradientNormMonitor(),
    ]
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=itm.ImageTextDataModule(*pairs, batch_size=12, num_workers=0, seed=3))
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.slow
def test_every_command(config, capsys, tmp_path):
    """Shards, fit, validate, test, predict and mine, one after the other, with what the one wrote for the next."""
    main(["shards", "write", "dataset.json", "shards/train", "--images_per_shard", "5"])
    assert "12 images and 60 texts in 3 shards" in capsys.readouterr().out
    main(["shards", "index", "shards/train/{00000..00001}.tar"])
    assert "10 images and 50 texts in 2 shards" in capsys.readouterr().out
    main(["shards", "verify", "shards/train"])
    given = ["--config", str(config), "--data.train", "shards/train"]
    main(["fit", *given, "--data.stream", "true", "--data.shuffle_buffer", "20"])
    trained = ["--ckpt_path", str(checkpoint())]
    main(["export", *trained, "--output", "exported"])
    assert capsys.readouterr().out == "exported: open_clip_config.json, open_clip_model.safetensors\n"
    for command in ("validate", "test"):
        main([command, *given, *trained])
        assert "rsum" in capsys.readouterr().out
    main(["predict", *given, *trained, "--output", "embeddings", "--split", "train"])
    image, text = (np.load(f"embeddings/{kind}.npy") for kind in ("image", "text"))
    rows = [json.loads(line) for line in Path("embeddings/texts.jsonl").read_text().splitlines()]
    assert (image.shape[0], text.shape[0], len(rows)) == (12, 60, 60)
    model = itm.OpenCLIPDualEncoder.load_from_checkpoint(checkpoint(), weights_only=True).eval()
    assert model.loss.online.negatives == "selective"
    theirs = open_clip.create_model("local-dir:exported").state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.model.state_dict().items())
    pairs = itm.data.read_pairs("shards/train", **model.transforms).evaluation()
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.encode_image(torch.stack([pairs.load_image(7)])))
    np.testing.assert_allclose(image[7], expected[0], atol=1e-6)
    assert rows[7] == {"text_id": 7, "image_id": 1, "text": pairs.texts[7]}

    scores = image @ text.T
    for format in ("jsonl", "parquet"):
        main(["mine", *given, *trained, "--output", f"mined-{format}", "--format", format, "--texts_per_image", "4"])
    lines = Path("mined-jsonl/texts_of_images.jsonl").read_text().splitlines()
    images = [json.loads(line) for line in Path("mined-jsonl/images_of_texts.jsonl").read_text().splitlines()]
    assert (len(lines), len(images)) == (12, 60)
    for row in map(json.loads, lines):
        others = [number for number in range(60) if rows[number]["image_id"] != row["image_id"]]
        hardest = sorted(others, key=lambda number: -scores[row["image_id"], number])[:4]
        found = [scores[row["image_id"], entry["text_id"]] for entry in row["texts"]]
        np.testing.assert_allclose(found, scores[row["image_id"], hardest], atol=1e-6)
        np.testing.assert_allclose([entry["score"] for entry in row["texts"]], found, atol=1e-5)
        assert row["image"].endswith(f"{row['image_id']:09d}")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table("mined-parquet/images_of_texts.parquet").to_pylist()
    assert [row["text"] for row in table] == [row["text"] for row in images]
    assert [[entry["image_id"] for entry in row["images"]] for row in table] == [
        [entry["image_id"] for entry in row["images"]] for row in images
    ]
    with pytest.raises(FileExistsError, match=r"folder without results, got embeddings with image\.npy"):
        main(["predict", *given, *trained, "--output", "embeddings", "--split", "train"])


@pytest.mark.slow
def test_an_encoder_of_ones_own_beside_the_data(tmp_path, monkeypatch):
    """First by the installed program, in a process of its own. `model_name` says which transforms its images get."""
    write_karpathy(tmp_path)
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "from lightning_itm import DualEncoder\n"
        "class Own(DualEncoder):\n"
        "    def __init__(self, width: int = 8, **kwargs):\n"
        "        super().__init__(**kwargs)\n"
        "        self.image_encoder = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, width))\n"
        "        self.text_encoder = nn.EmbeddingBag(49408, width)\n"
        "    def encode_image(self, image): return self.image_encoder(image)\n"
        "    def encode_text(self, text): return self.text_encoder(text)\n"
    )
    given = ["--model", "own.Own", "--model.width", "4", "--model.loss", "lightning_itm.SigmoidLoss"]
    given += ["--data.train", "dataset.json", "--data.val", "dataset.json", "--data.model_name", "ViT-S-32-alt"]
    given += ["--data.batch_size", "20", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]
    program = str(Path(sys.executable).parent / "lightning-itm")
    done = subprocess.run([program, "fit", *given], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.load(checkpoint(), weights_only=True)["state_dict"]["text_encoder.weight"].shape == (49408, 4)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    # The rest in this process, which has not seen the class yet: a second start would import for longer than it runs.
    for more in (["mine"], ["validate", "--trainer.logger", "false"]):
        main([more[0], *given, *more[1:], "--ckpt_path", str(checkpoint())])
        assert Path(sys.modules.pop("own").__file__).parent == tmp_path


def test_an_encoder_that_sets_arguments_of_the_base_itself(tmp_path, monkeypatch):
    """So they are not among the options of the command line, where Lightning would look for them."""
    write_karpathy(tmp_path)
    (tmp_path / "fixed.py").write_text(
        "from torch import nn\n"
        "from lightning_itm import DualEncoder, TripletLoss\n"
        "class Fixed(DualEncoder):\n"
        "    def __init__(self, width: int = 8):\n"
        "        super().__init__(TripletLoss(), learning_rate=1e-3, warmup_steps=0)\n"
        "        self.image_encoder = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, width))\n"
        "        self.text_encoder = nn.EmbeddingBag(49408, width)\n"
        "    def encode_image(self, image): return self.image_encoder(image)\n"
        "    def encode_text(self, text): return self.text_encoder(text)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    given = ["--model", "fixed.Fixed", "--model.width", "4", "--data.train", "dataset.json", "--data.batch_size", "20"]
    given += ["--data.model_name", "emoji-clip", "--data.num_workers", "0", "--trainer.max_steps", "1"]
    main(["fit", *given, "--trainer.accelerator", "cpu"])
    saved = torch.load(checkpoint(), weights_only=True)
    assert saved["state_dict"]["text_encoder.weight"].shape == (49408, 4)
    assert saved["hyper_parameters"]["learning_rate"] == 1e-3


class TestConfigs:
    def test_examples_are_read_with_nothing_left_over(self, capsys):
        """Every class is found, every argument is known."""
        with pytest.raises(SystemExit):
            main(["fit", "--config", str(EXAMPLES / "configs" / "clip_coco.yaml"), "--print_config"])
        self.check(capsys.readouterr().out)

    def test_an_example_is_read_by_the_module(self, capsys, monkeypatch):
        """As ``python -m lightning_itm.cli`` does it: the module is run anew, as a program."""
        arguments = ["fit", "--config", str(EXAMPLES / "configs" / "clip_flickr30k.yaml"), "--print_config"]
        monkeypatch.setattr(sys, "argv", ["lightning-itm", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(sys.modules["lightning_itm.cli"].__file__, run_name="__main__")
        assert ended.value.code in (0, None)
        self.check(capsys.readouterr().out)

    def check(self, said):
        values = yaml.safe_load(said)
        assert values["model"]["class_path"].endswith("OpenCLIPDualEncoder")
        assert values["data"]["init_args"]["batch_size"] == 256
        assert values["trainer"]["callbacks"]

    def test_unknown_options_are_named(self, config, capsys):
        with pytest.raises(SystemExit):
            main(["fit", "--config", str(config), "--model.learning_rat", "1"])
        assert "learning_rat" in capsys.readouterr().err

    @pytest.mark.parametrize("command", [[], ["fit"], ["mine"], ["shards"], ["shards", "write"], ["export"]])
    def test_help(self, command, capsys):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--help"])
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert "usage: lightning-itm" in text
        if command in (["fit"], ["mine"]):
            assert "\n  --data.train SOURCE " in text
        if not command:
            assert "\n  lightning-itm mine     --config" in text
