import json
import math
from copy import deepcopy

import lightning as L
import open_clip
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging

from lightning_itm import InfoNCELoss, OpenCLIPDualEncoder, SigmoidLoss, TripletLoss
from lightning_itm.export.open_clip_folder import describe_model
from tests.helpers.no_room import files_below
from tests.helpers.open_clip_models import CONFIGS, TIMM, data_for, register, write_hugging_face
from tests.helpers.pictures import cut_outs
from tests.helpers.tiny import SILENT

TEXTS = ["a red square", "the Cat, and the cup of coffee"]


@pytest.fixture(scope="module", autouse=True)
def _registered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    register({**CONFIGS, **TIMM, "tiny-hugging": write_hugging_face(folder / "tower")}, folder)


def trained(name, loss=None, callbacks=(), **options):
    """A model after two steps that move the temperature far from where it was."""
    model = OpenCLIPDualEncoder(name, loss=loss, learning_rate=0.05, warmup_steps=0, **options)
    trainer = L.Trainer(max_steps=2, limit_val_batches=0, callbacks=list(callbacks), **SILENT)
    trainer.fit(model, datamodule=data_for(model))
    return model.eval()


def check_same(model, theirs, transform, tokenizer):
    """The same tensors for real pictures and texts, the same embeddings, the same scale."""
    pictures = torch.stack([transform(picture) for picture in cut_outs(3, 50)])
    assert torch.equal(
        pictures, torch.stack([model.transforms["eval_transform"](picture) for picture in cut_outs(3, 50)])
    )
    tokens = tokenizer(TEXTS)
    assert torch.equal(tokens, model.transforms["tokenizer"](TEXTS))
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval().encode_image(pictures), model.encode_image(pictures), rtol=0, atol=0)
        torch.testing.assert_close(theirs.encode_text(tokens), model.encode_text(tokens), rtol=0, atol=0)
    if hasattr(model.loss, "logit_scale"):
        assert theirs.logit_scale.item() == model.loss.logit_scale.item()
    if hasattr(model.loss, "logit_bias"):
        assert theirs.logit_bias.item() == model.loss.logit_bias.item()


@pytest.mark.parametrize(
    ("name", "loss"),
    [(name, None) for name in (*CONFIGS, *TIMM, "tiny-hugging")]
    + [("tiny-bias", SigmoidLoss), ("tiny-vit", TripletLoss)],
)
def test_open_clip_loads_what_was_trained(name, loss, tmp_path):
    model = trained(name, loss and loss())
    model.save_pretrained(tmp_path / "out")
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    check_same(model, theirs, transform, open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}"))
    if loss is not TripletLoss:
        at_start = open_clip.create_model(name).logit_scale.item()
        assert abs(theirs.logit_scale.item() - at_start) > 0.01


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-bias", "tiny-coca"])
def test_loads_by_name_and_file_as_clip_benchmark_does(name, tmp_path):
    model = trained(name, SigmoidLoss() if name == "tiny-bias" else None)
    model.save_pretrained(tmp_path / "out")
    theirs, _, transform = open_clip.create_model_and_transforms(
        name, pretrained=str(tmp_path / "out" / "open_clip_model.safetensors"), cache_dir=str(tmp_path)
    )
    check_same(model, theirs, transform, open_clip.get_tokenizer(name))


def test_a_bias_that_the_model_does_not_have(tmp_path):
    model = trained("tiny-vit", SigmoidLoss(init_logit_bias=-6.0))
    with pytest.warns(
        UserWarning, match=r"SigmoidLoss has trained a `logit_bias`, which open_clip's 'tiny-vit' does not"
    ):
        model.save_pretrained(tmp_path / "out")
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'out'}")
    assert theirs.logit_bias.item() == model.loss.logit_bias.item() != -6.0
    again = OpenCLIPDualEncoder(f"local-dir:{tmp_path / 'out'}", loss=SigmoidLoss())
    assert again.loss.logit_bias.item() == model.loss.logit_bias.item()


class TestScale:
    def test_of_the_model_is_that_of_the_loss(self):
        model = OpenCLIPDualEncoder("tiny-bias", loss=SigmoidLoss(2.0, -3.0))
        assert model.model.logit_scale.item() == 2.0
        with torch.no_grad():
            model.loss.logit_scale.fill_(1.5)
            model.loss.logit_bias.fill_(-4.0)
        state = model.model.state_dict()
        assert (state["logit_scale"].item(), state["logit_bias"].item()) == (1.5, -4.0)
        assert model.state_dict()["model.logit_scale"].item() == 1.5
        with torch.no_grad():
            model.loss.logit_scale.fill_(1.0)
        assert model.eval().model.logit_scale.item() == 1.0

    def test_of_a_copy_is_its_own(self):
        model = OpenCLIPDualEncoder("tiny-vit", loss=InfoNCELoss(2.0))
        copy = deepcopy(model)
        with torch.no_grad():
            model.loss.logit_scale.fill_(1.5)
        assert copy.state_dict()["model.logit_scale"].item() == 2.0
        assert model.state_dict()["model.logit_scale"].item() == 1.5

    def test_stays_in_its_range(self, tmp_path):
        """The last step may lead out of it."""
        model = OpenCLIPDualEncoder("tiny-vit")
        with torch.no_grad():
            model.loss.logit_scale.fill_(5.0)
        model.save_pretrained(tmp_path / "out")
        theirs = open_clip.create_model(f"local-dir:{tmp_path / 'out'}")
        assert theirs.logit_scale.item() == pytest.approx(math.log(100))

    def test_is_the_pretrained_one_where_the_loss_has_none(self):
        model = OpenCLIPDualEncoder("tiny-bias", loss=TripletLoss())
        state = model.model.state_dict()
        assert (state["logit_scale"].item(), state["logit_bias"].item()) == (pytest.approx(math.log(20)), -7.0)


@pytest.mark.filterwarnings("ignore:Found .* module\\(s\\) in eval mode")
def test_locked_and_compiled_towers(tmp_path):
    """Nothing is run, so nothing is compiled: the names are what matters."""
    model = OpenCLIPDualEncoder("tiny-vit", lock_image=True, lock_text=True, compile=True)
    model.model.visual = torch.compile(model.model.visual)  # as a user may do it, with `_orig_mod` in the names
    model.save_pretrained(tmp_path / "out")
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'out'}")
    assert torch.equal(theirs.visual.proj, model.model.visual.proj)


class SaveAtEachStep(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.path)


def test_averaged_weights_are_written(tmp_path):
    """Those that a checkpoint of the last step has, and not the live ones that it has beside them."""
    model = trained("tiny-vit", callbacks=[EMAWeightAveraging(decay=0.5), SaveAtEachStep(tmp_path / "last.ckpt")])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    averaged, live = saved["state_dict"], saved["current_model_state"]
    for number, module in enumerate((model, OpenCLIPDualEncoder.load_from_checkpoint(tmp_path / "last.ckpt"))):
        module.save_pretrained(tmp_path / f"out-{number}")
        theirs = open_clip.create_model(f"local-dir:{tmp_path / f'out-{number}'}")
        assert torch.equal(theirs.visual.proj, averaged["model.visual.proj"])
        assert not torch.equal(theirs.visual.proj, live["model.visual.proj"])
        assert theirs.logit_scale.item() == averaged["loss.logit_scale"].item() != live["loss.logit_scale"].item()


class TestRefuses:
    def test_a_folder_with_something_in_it(self, tmp_path):
        (tmp_path / "open_clip_config.json").write_text("{}")
        with pytest.raises(FileExistsError, match=r"new or an empty folder, got .* with 'open_clip_config.json'"):
            OpenCLIPDualEncoder("tiny-vit").save_pretrained(tmp_path)

    def test_adapters(self, tmp_path):
        peft = pytest.importorskip("peft")
        model = OpenCLIPDualEncoder("tiny-vit")
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["c_fc"]), model.model)
        with pytest.raises(ValueError, match=r"that open_clip makes for 'tiny-vit', got \d+ others, .*Merge adapters"):
            model.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_another_tokenizer(self, tmp_path):
        model = OpenCLIPDualEncoder("tiny-vit")
        model.transforms["tokenizer"] = lambda texts: torch.zeros(len(texts), 16)
        with pytest.raises(ValueError, match=r"makes for 'tiny-vit', got function, which would not be loaded"):
            model.save_pretrained(tmp_path / "out")

    def test_a_full_disk_leaves_no_half_model(self, tmp_path):
        model = OpenCLIPDualEncoder("tiny-vit")
        with files_below(100_000), pytest.raises(Exception, match=r"(?i)file too large|i/o error"):
            model.save_pretrained(tmp_path / "out")
        assert list((tmp_path / "out").iterdir()) == []


class TestCheckpoint:
    def checkpoint(self, tmp_path, name="tiny-vit", **options):
        model = OpenCLIPDualEncoder(name, **options)
        trainer = L.Trainer(max_steps=2, limit_val_batches=0, **SILENT)
        trainer.fit(model, datamodule=data_for(model))
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        return model.eval()

    def test_needs_neither_the_weights_nor_the_configuration_again(self, tmp_path, caplog):
        config = {**CONFIGS["tiny-vit"], "embed_dim": 20}
        register({"tiny-passing": config}, tmp_path)
        torch.save(open_clip.create_model("tiny-passing").state_dict(), tmp_path / "weights.pt")
        model = self.checkpoint(tmp_path, "tiny-passing", pretrained=tmp_path / "weights.pt")
        (tmp_path / "weights.pt").unlink()
        del open_clip.factory._MODEL_CONFIGS["tiny-passing"]  # as in another process, which has not registered it
        caplog.clear()
        loaded = OpenCLIPDualEncoder.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True).eval()
        assert "weights" not in caplog.text, "it is not random"
        assert loaded.hparams == model.hparams
        check_same(loaded, model.model, model.transforms["eval_transform"], model.transforms["tokenizer"])

    def test_a_folder_that_is_gone(self, tmp_path):
        OpenCLIPDualEncoder("tiny-vit").save_pretrained(tmp_path / "start")
        config = json.loads((tmp_path / "start" / "open_clip_config.json").read_text())
        config["preprocess_cfg"] |= {"mean": [0.5, 0.5, 0.5], "interpolation": "bilinear", "resize_mode": "squash"}
        (tmp_path / "start" / "open_clip_config.json").write_text(json.dumps(config))
        model = self.checkpoint(tmp_path, f"local-dir:{tmp_path / 'start'}")
        (tmp_path / "start").rename(tmp_path / "elsewhere")
        loaded = OpenCLIPDualEncoder.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True).eval()
        check_same(loaded, model.model, model.transforms["eval_transform"], model.transforms["tokenizer"])
        assert loaded.model.visual.preprocess_cfg["resize_mode"] == "squash"
        loaded.save_pretrained(tmp_path / "out")
        theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
        check_same(model, theirs, transform, model.transforms["tokenizer"])

    def test_another_model_by_name(self, tmp_path):
        self.checkpoint(tmp_path)
        with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
            OpenCLIPDualEncoder.load_from_checkpoint(tmp_path / "a.ckpt", model_name="tiny-rn")

    def test_an_older_one_does_not_say_how_images_are_prepared(self):
        """But the name of its weights does, and nothing is downloaded."""
        options = OpenCLIPDualEncoder.options_for_export({"model_name": "ViT-B-16-SigLIP", "pretrained": "webli"})
        assert options["config"]["preprocess_cfg"]["mean"] == [0.5, 0.5, 0.5]
        assert options["config"]["model_cfg"] == open_clip.get_model_config("ViT-B-16-SigLIP")
        assert describe_model("ViT-B-32")["preprocess_cfg"]["mean"][0] == pytest.approx(0.48145466)
