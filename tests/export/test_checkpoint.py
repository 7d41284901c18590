import sys

import open_clip
import pytest
import torch
import yaml

from lightning_itm import InfoNCELoss, OpenCLIPDualEncoder, TripletLoss
from lightning_itm.cli import main
from lightning_itm.export import load_module
from tests.helpers.open_clip_models import CONFIGS, register
from tests.helpers.tiny import Tiny


@pytest.fixture(scope="module", autouse=True)
def _registered(tmp_path_factory):
    register(CONFIGS, tmp_path_factory.mktemp("configs"))


def test_the_command_writes_what_open_clip_loads(save, tmp_path, capsys):
    model = OpenCLIPDualEncoder("tiny-vit", loss=InfoNCELoss(1.25, hardness=2.0), compile=True)
    main(["export", "--ckpt_path", str(save(model)), "--output", str(tmp_path / "out")])
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: open_clip_config.json, open_clip_model.safetensors\n"
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'out'}")
    assert theirs.logit_scale.item() == 1.25
    assert torch.equal(theirs.visual.proj, model.model.visual.proj)


def test_an_older_checkpoint_with_a_configuration_beside_it(save, tmp_path):
    """It holds neither the class, nor the loss, nor how the model is built. Its weights are not read again."""
    model = OpenCLIPDualEncoder("tiny-vit")
    (tmp_path / "checkpoints").mkdir()
    hparams = {**model.hparams, "pretrained": "/is/gone.pt"}
    del hparams["config"]
    path = save(model, "checkpoints/a.ckpt", class_path=None, loss=None, hyper_parameters=hparams)
    with pytest.raises(
        ValueError, match=r"names the class of its module, got .*a\.ckpt'\. Name it, as in `--model light"
    ):
        load_module(path)
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"model": {"class_path": "lightning_itm.OpenCLIPDualEncoder"}})
    )
    loaded = load_module(path)
    assert torch.equal(loaded.model.visual.proj, model.model.visual.proj)
    assert not loaded.training


def test_any_module_by_its_name(save):
    path = save(Tiny(TripletLoss(0.3)), class_path="__main__.Tiny")
    with pytest.raises(ValueError, match=r"a class that can be imported, got '__main__.Tiny'. Name it"):
        load_module(path)
    assert load_module(path, "tests.helpers.tiny.Tiny").loss.margin == 0.3
    with pytest.raises(NotImplementedError, match=r"a format of its own, got Tiny. Override `save_pretrained`"):
        main(["export", "--ckpt_path", str(path), "--output", "out", "--model", "tests.helpers.tiny.Tiny"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.Own", "got 'nowhere.Own': No module named 'nowhere'"),
        ("lightning_itm.Own", "got 'lightning_itm.Own': module 'lightning_itm' has no attribute 'Own'"),
        ("torch.nn.Linear", "a subclass of lightning_itm.DualEncoder, got 'torch.nn.Linear'"),
    ],
)
def test_a_class_that_is_none(save, name, message):
    with pytest.raises(ValueError, match=message):
        load_module(save(Tiny()), name)


def test_files_that_are_no_checkpoint(save, tmp_path):
    with pytest.raises(ValueError, match=r"to be a file, got the folder .* weights in shards"):
        load_module(tmp_path)
    torch.save({"weight": torch.ones(1)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"Lightning's Trainer, got .*weights\.pt' without a 'state_dict'"):
        load_module(tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"got .* with other objects. .*--weights_only false"):
        load_module(save(Tiny(), own=TripletLoss()))


def test_a_file_does_not_choose_what_is_imported(save, tmp_path, monkeypatch):
    text = "from tests.helpers.tiny import Tiny\nclass Own(Tiny):\n    pass\n"
    (tmp_path / "own_beside_the_data.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    path = save(Tiny(), class_path="own_beside_the_data.Own")
    with pytest.raises(ValueError, match=r"If you trust it, name it yourself: `--model own_beside_the_data\.Own`"):
        load_module(path)
    assert "own_beside_the_data" not in sys.modules
    assert type(load_module(path, "own_beside_the_data.Own")).__name__ == "Own"
    del sys.modules["own_beside_the_data"]
