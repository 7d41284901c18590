import json
import math

import lightning as L
import open_clip
import pytest
import torch

from lightning_itm import (
    FalseNegativeElimination,
    ImageTextDataset,
    InfoNCELoss,
    OpenCLIPDualEncoder,
    SigmoidLoss,
    TripletLoss,
)
from tests.compilation import needs_compiler
from tests.helpers.open_clip_models import CONFIGS, TIMM, data_for, register
from tests.helpers.pictures import cut_outs
from tests.helpers.tiny import SILENT

EVAL_MODE = "ignore:Found .* module\\(s\\) in eval mode"  # Lightning's word for batch norms that are locked


@pytest.fixture(scope="module", autouse=True)
def _registered(tmp_path_factory):
    register(CONFIGS | TIMM, tmp_path_factory.mktemp("configs"))


@pytest.fixture
def weights(tmp_path):
    """Weights of a model that somebody else has trained."""

    def save(name):
        torch.manual_seed(4)
        model = open_clip.create_model(name)
        with torch.no_grad():
            model.logit_scale.fill_(3.5)
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        return model, tmp_path / "weights.pt"

    return save


def trainer(**options):
    return L.Trainer(**{**SILENT, "max_epochs": 1, **options})


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_trains_with_its_own_transforms_and_tokenizer(name, gradient_checkpointing):
    model = OpenCLIPDualEncoder(
        name, loss=TripletLoss(negatives="selective"), gradient_checkpointing=gradient_checkpointing, learning_rate=1e-3
    )
    data = data_for(model)
    sample = data.train_dataset[0]
    assert sample["image"].shape == (3, 32, 32)
    assert sample["text"].shape == (16,)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer().fit(model, datamodule=data)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert any(name.startswith("model.visual") for name in moved)
    assert any("text" in name or "transformer.resblocks" in name for name in moved)


@pytest.mark.parametrize("name", CONFIGS)
def test_encodes_as_open_clip_does(name, weights):
    theirs, path = weights(name)
    model = OpenCLIPDualEncoder(name, pretrained=path).eval()
    batch = next(iter(data_for(model).val_dataloader()))
    pairs = model.embed(batch)
    torch.testing.assert_close(pairs.image_embeddings, theirs.eval().encode_image(batch["image"], normalize=True))
    torch.testing.assert_close(pairs.text_embeddings, theirs.encode_text(batch["text"], normalize=True))


class TestScale:
    def test_comes_with_pretrained_weights(self, weights):
        _, path = weights("tiny-vit")
        model = OpenCLIPDualEncoder("tiny-vit", pretrained=path)
        assert model.loss.logit_scale.item() == 3.5
        assert not model.model.logit_scale.requires_grad

    def test_is_the_users_if_given(self, weights):
        _, path = weights("tiny-vit")
        assert OpenCLIPDualEncoder("tiny-vit", path, InfoNCELoss(2.0)).loss.logit_scale.item() == 2.0

    def test_is_the_losss_own_without_weights(self):
        model = OpenCLIPDualEncoder("tiny-vit")
        assert model.loss.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
        with torch.no_grad():
            model.model.logit_scale.fill_(3.5)
        model.loss = InfoNCELoss()
        assert model.loss.logit_scale.item() == pytest.approx(math.log(1 / 0.07))

    def test_comes_with_a_loss_that_is_set_later(self, weights):
        _, path = weights("tiny-vit")
        model = OpenCLIPDualEncoder("tiny-vit", path, TripletLoss())
        model.loss = InfoNCELoss(hardness=9)
        assert model.loss.logit_scale.item() == 3.5
        model.loss = InfoNCELoss(2.0)
        assert model.loss.logit_scale.item() == 2.0

    def test_that_was_trained_elsewhere_is_kept(self, weights):
        _, path = weights("tiny-vit")
        loss = OpenCLIPDualEncoder("tiny-vit", path).loss
        with torch.no_grad():
            loss.logit_scale.fill_(3.0)
        assert OpenCLIPDualEncoder("tiny-vit", path, loss).loss.logit_scale.item() == 3.0

    def test_of_a_checkpoint_comes_with_a_loss_that_is_set_later(self, weights, tmp_path):
        _, path = weights("tiny-vit")
        model = OpenCLIPDualEncoder("tiny-vit", path, learning_rate=1e-2, warmup_steps=0)
        fit = trainer()
        fit.fit(model, datamodule=data_for(model))
        fit.save_checkpoint(tmp_path / "last.ckpt")
        again = OpenCLIPDualEncoder.load_from_checkpoint(tmp_path / "last.ckpt")
        again.loss = InfoNCELoss(hardness=9)
        assert again.loss.logit_scale.item() == model.loss.logit_scale.item() != 3.5
        trained = OpenCLIPDualEncoder(
            "tiny-vit", path, OpenCLIPDualEncoder.load_from_checkpoint(tmp_path / "last.ckpt").loss
        )
        assert trained.loss.logit_scale.item() == model.loss.logit_scale.item()

    def test_comes_with_a_loss_that_a_checkpoint_does_not_have(self, weights, tmp_path):
        _, path = weights("tiny-vit")
        model = OpenCLIPDualEncoder("tiny-vit", path, TripletLoss())
        fit = trainer()
        fit.fit(model, datamodule=data_for(model))
        fit.save_checkpoint(tmp_path / "last.ckpt")
        options = {"loss": InfoNCELoss(), "strict": False}
        assert (
            OpenCLIPDualEncoder.load_from_checkpoint(tmp_path / "last.ckpt", **options).loss.logit_scale.item() == 3.5
        )

    def test_comes_with_its_bias_or_not_at_all(self, weights):
        _, path = weights("tiny-bias")
        loss = OpenCLIPDualEncoder("tiny-bias", path, SigmoidLoss()).loss
        assert (loss.logit_scale.item(), loss.logit_bias.item()) == (3.5, -7.0)
        _, path = weights("tiny-vit")  # a model without a bias
        loss = OpenCLIPDualEncoder("tiny-vit", path, SigmoidLoss()).loss
        assert (loss.logit_scale.item(), loss.logit_bias.item()) == (pytest.approx(math.log(10)), -10.0)


@pytest.mark.filterwarnings(EVAL_MODE)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_locked_tower_stays_as_it_is(name, tower):
    model = OpenCLIPDualEncoder(name, learning_rate=1e-2, **{f"lock_{tower}": True})
    batch = next(iter(data_for(model).val_dataloader()))
    before = model.eval().embed(batch)
    trainer(limit_val_batches=0).fit(model.train(), datamodule=data_for(model))
    after = model.eval().embed(batch)
    locked, other = f"{tower}_embeddings", {"image": "text_embeddings", "text": "image_embeddings"}[tower]
    assert torch.equal(getattr(before, locked), getattr(after, locked)), "batch statistics included"
    assert not torch.equal(getattr(before, other), getattr(after, other))


@pytest.mark.filterwarnings(EVAL_MODE)
@pytest.mark.parametrize("name", ["tiny-rn", "tiny-timm"])
def test_no_buffer_of_a_locked_tower_changes(name):
    """Of the stem neither, which `lock(freeze_bn_stats=True)` of open_clip's next version forgets."""
    torch.manual_seed(3)
    free = OpenCLIPDualEncoder(name)
    torch.manual_seed(3)
    locked = OpenCLIPDualEncoder(name, lock_image=True, learning_rate=1e-2)
    before = {key: value.clone() for key, value in locked.model.visual.named_buffers()}
    for model in (locked, free):
        fitter = trainer(max_epochs=None, max_steps=10)
        fitter.fit(model, datamodule=data_for(model))
        assert fitter.global_step == 10
    assert any("running_var" in key for key in before)
    assert all(torch.equal(value, before[key]) for key, value in locked.model.visual.named_buffers())
    moved = [key for key, value in free.model.visual.named_buffers() if not torch.equal(value, before[key])]
    assert len(moved) == len(before), "or these were no batch statistics"


@pytest.mark.parametrize("name", ["tiny-rn", "tiny-timm"])
def test_a_lock_does_not_change_what_a_tower_computes(name, weights):
    theirs, path = weights(name)
    model = OpenCLIPDualEncoder(name, pretrained=path, lock_image=True)
    image = next(iter(data_for(model).val_dataloader()))["image"]
    torch.testing.assert_close(model.encode_image(image), theirs.eval().encode_image(image))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_trained_parameter_gets_a_gradient(name):
    """Or DDP would stop."""
    model = OpenCLIPDualEncoder(name)
    model.training_step(next(iter(data_for(model).val_dataloader())), 0).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_checkpoint_loads_by_itself(tmp_path):
    model = OpenCLIPDualEncoder("tiny-vit", lock_image=True, augmentation={"scale": (0.5, 1.0)}, learning_rate=1e-3)
    fitter = trainer(enable_checkpointing=True, default_root_dir=tmp_path)
    fitter.fit(model, datamodule=data_for(model))
    fitter.save_checkpoint(tmp_path / "a.ckpt")
    loaded = OpenCLIPDualEncoder.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert loaded.hparams == model.hparams
    assert "loss" not in loaded.hparams


def test_fine_tuned_weights_go_back_to_open_clip(tmp_path):
    model = OpenCLIPDualEncoder("tiny-vit")
    torch.save(model.model.state_dict(), tmp_path / "tuned.pt")
    theirs = open_clip.create_model("tiny-vit", pretrained=str(tmp_path / "tuned.pt"))
    assert torch.equal(theirs.visual.proj, model.model.visual.proj)


def test_augmentation_is_of_training_only():
    model = OpenCLIPDualEncoder("tiny-vit", augmentation={"scale": (0.1, 0.2)})
    pairs = ImageTextDataset(cut_outs(2, 40), ["a", "b"], **model.transforms)
    first = pairs[0]["image"]
    assert not torch.equal(first, pairs[0]["image"])
    assert torch.equal(pairs.evaluation()[0]["image"], model.transforms["eval_transform"](cut_outs(2, 40)[0]))


class TestCompile:
    def test_names_and_values_are_those_of_the_eager_model(self, tmp_path):
        """Nothing is run, so nothing is compiled yet."""
        plain, compiled = OpenCLIPDualEncoder("tiny-bias"), OpenCLIPDualEncoder("tiny-bias", compile=True)
        fitter = trainer(limit_train_batches=0, limit_val_batches=0)
        fitter.fit(compiled, datamodule=data_for(compiled))
        fitter.save_checkpoint(tmp_path / "a.ckpt")
        assert OpenCLIPDualEncoder.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True).hparams.compile
        loaded = OpenCLIPDualEncoder.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True, compile=False)
        assert loaded.state_dict().keys() == plain.state_dict().keys() == compiled.state_dict().keys()
        assert all(torch.equal(value, compiled.state_dict()[name]) for name, value in loaded.state_dict().items())

    @pytest.mark.slow
    @pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf"
    )  # dynamo looks at it itself
    @needs_compiler
    def test_trains_as_the_eager_model_does_and_copies_have_their_own_weights(self, tmp_path):
        config = CONFIGS["tiny-vit"]
        config = {key: {**part, "layers": 1} if isinstance(part, dict) else part for key, part in config.items()}
        (tmp_path / "tiny-flat.json").write_text(json.dumps(config))  # compiled sooner
        open_clip.add_model_config(tmp_path / "tiny-flat.json")
        torch._dynamo.utils.counters.clear()
        losses = {}
        for compiles in (False, True):
            torch.manual_seed(1)
            model = OpenCLIPDualEncoder(
                "tiny-flat", loss=TripletLoss(), learning_rate=1e-3, warmup_steps=0, compile=compiles
            )
            memory = FalseNegativeElimination(queue_size=16, momentum=0.5, start_epoch=0)
            fitter = trainer(callbacks=[memory], limit_val_batches=0)
            fitter.fit(model, datamodule=data_for(model))
            assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == compiles
            losses[compiles] = fitter.callback_metrics["train/loss"]
        torch.testing.assert_close(losses[True], losses[False], rtol=1e-3, atol=1e-4)
        batch = next(iter(data_for(model).val_dataloader()))
        eager = OpenCLIPDualEncoder("tiny-flat", loss=TripletLoss()).eval()
        with torch.no_grad():
            slow, live = memory.encoder(batch), model.eval().embed(batch)
            eager.load_state_dict(memory.encoder.module.state_dict())
            own = eager.embed(batch)
            eager.load_state_dict(model.state_dict())
            of_model = eager.embed(batch)
        for side in ("image_embeddings", "text_embeddings"):
            torch.testing.assert_close(getattr(slow, side), getattr(own, side))
            torch.testing.assert_close(getattr(live, side), getattr(of_model, side))
            assert not torch.allclose(getattr(slow, side), getattr(live, side), atol=1e-3)


def test_unknown_model():
    with pytest.raises(ValueError, match=r"one of open_clip.list_models\(\) .* got 'ViT-Z-1'"):
        OpenCLIPDualEncoder("ViT-Z-1")


def test_unknown_weights():
    with pytest.raises(Exception, match="no_such_tag"):
        OpenCLIPDualEncoder("ViT-B-32", pretrained="no_such_tag")
