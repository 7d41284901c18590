import json

import lightning as L
import open_clip
import pytest
import torch

from lightning_itm import OpenCLIPDualEncoder
from lightning_itm.cli import ItmCLI
from tests.helpers.open_clip_models import CONFIGS, TEXT, data_for, register
from tests.helpers.tiny import SILENT


@pytest.fixture(scope="module", autouse=True)
def _registered(tmp_path_factory):
    register(CONFIGS, tmp_path_factory.mktemp("configs"))


@pytest.fixture
def file(tmp_path):
    """A configuration of one's own, under the name of a model that open_clip has."""
    config = {**CONFIGS["tiny-vit"], "embed_dim": 20, "text_cfg": {**TEXT, "context_length": 12}}
    (tmp_path / "ViT-B-32.json").write_text(json.dumps(config))
    return tmp_path / "ViT-B-32.json"


def saved_and_loaded(model, folder):
    fitter = L.Trainer(**SILENT, max_steps=1, limit_val_batches=0)
    fitter.fit(model, datamodule=data_for(model))
    fitter.save_checkpoint(folder / "a.ckpt")
    loaded = OpenCLIPDualEncoder.load_from_checkpoint(folder / "a.ckpt", weights_only=True)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert loaded.hparams == model.hparams
    return loaded


class TestFile:
    @pytest.mark.parametrize("as_text", [False, True])
    def test_is_read_and_kept_in_checkpoints(self, file, as_text, tmp_path):
        model = OpenCLIPDualEncoder(str(file) if as_text else file)
        assert model.encode_image(torch.zeros(1, 3, 32, 32)).shape == (1, 20)
        assert model.transforms["tokenizer"](["a"]).shape == (1, 12)
        file.unlink()
        assert saved_and_loaded(model, tmp_path).encode_image(torch.zeros(1, 3, 32, 32)).shape == (1, 20)

    def test_replaces_no_model(self, file):
        before = open_clip.get_model_config("ViT-B-32")
        OpenCLIPDualEncoder(file)
        assert open_clip.get_model_config("ViT-B-32") == before

    def test_from_the_command_line(self, file):
        arguments = ["--model.model_name", str(file), "--model.force_image_size", "48"]
        arguments += ["--model.class_path", "lightning_itm.OpenCLIPDualEncoder"]
        cli = ItmCLI(run=False, args=[*arguments, "--data.train", "unused.csv"])
        assert cli.model.encode_image(torch.zeros(1, 3, 48, 48)).shape == (1, 20)

    def test_that_is_not_there(self):
        with pytest.raises(FileNotFoundError, match=r"configuration at 'no\.json', found none"):
            OpenCLIPDualEncoder("no.json")

    @pytest.mark.parametrize(
        ("text", "message"),
        [('{"embed_dim": 8}', r"\['vision_cfg', 'text_cfg'\] missing"), ("[]", "missing"), ("{", "Expected JSON in")],
    )
    def test_that_is_no_configuration(self, file, text, message):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            OpenCLIPDualEncoder(file)


class TestOptions:
    def test_image_size(self, tmp_path):
        model = OpenCLIPDualEncoder("tiny-vit", force_image_size=64)
        assert data_for(model).train_dataset[0]["image"].shape == (3, 64, 64)
        assert saved_and_loaded(model, tmp_path).model.visual.image_size in (64, (64, 64))

    def test_context_length(self, tmp_path):
        model = OpenCLIPDualEncoder("tiny-vit", force_context_length=9)
        assert data_for(model).train_dataset[0]["text"].shape == (9,)
        assert saved_and_loaded(model, tmp_path).model.context_length == 9

    def test_quick_gelu(self, tmp_path):
        model = OpenCLIPDualEncoder("tiny-vit", force_quick_gelu=True)
        loaded = saved_and_loaded(model, tmp_path)
        names = [type(module).__name__ for module in loaded.modules()]
        assert names.count("QuickGELU") == 4
        assert "GELU" not in names

    def test_mean_and_deviation(self, tmp_path):
        model = OpenCLIPDualEncoder("tiny-vit", image_mean=[0.1, 0.2, 0.3], image_std=(0.4, 0.5, 0.6))
        for one in (model, saved_and_loaded(model, tmp_path)):
            normalize = one.transforms["eval_transform"].transforms[-1]
            assert (list(normalize.mean), list(normalize.std)) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])

    def test_cache_folder(self, tmp_path, monkeypatch):
        """Nothing is downloaded: a file that is in the folder already is found."""
        model = open_clip.create_model("tiny-vit")
        entry = tmp_path / "cache" / "models--them--tiny" / "snapshots" / "1"
        entry.mkdir(parents=True)
        (entry.parents[1] / "refs").mkdir()
        (entry.parents[1] / "refs" / "main").write_text("1")
        (entry / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": CONFIGS["tiny-vit"], "preprocess_cfg": {}})
        )
        torch.save(model.state_dict(), entry / "open_clip_pytorch_model.bin")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        found = OpenCLIPDualEncoder("hf-hub:them/tiny", cache_dir=tmp_path / "cache")
        assert torch.equal(found.model.visual.proj, model.visual.proj)
        assert found.hparams.cache_dir == str(tmp_path / "cache")
