import math
import shutil
import sys

import lightning as L
import pytest
import torch

from lightning_itm import (
    FalseNegativeElimination,
    GradientNormMonitor,
    HFDualEncoder,
    ImageTextDataset,
    InfoNCELoss,
    OfflineHardNegativeMining,
    SigmoidLoss,
    TripletLoss,
    zero_shot_accuracy,
)
from tests.helpers.hugging_face import CONFIGS, FAMILIES, data_for, hf_model, tokenizer, transformers
from tests.helpers.pictures import cut_outs
from tests.helpers.tiny import SILENT


def trainer(**options):
    return L.Trainer(**{**SILENT, "max_epochs": 1, **options})


class PlainOptimizer(HFDualEncoder):
    """Without a schedule, which would depend on the number of epochs."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameter_groups(), lr=1e-3)


def batch_of(model):
    return next(iter(data_for(model).val_dataloader()))


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.fixture
def folder(tmp_path):
    """A model, a tokenizer and a processor of somebody else, as they are on the hub."""

    def save(family, **attributes):
        model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**CONFIGS[family]))
        with torch.no_grad():
            for name, value in attributes.items():
                getattr(model, name).fill_(value)
        model.save_pretrained(tmp_path / "theirs")
        tokenizer(family).save_pretrained(tmp_path / "theirs")
        hf_model(family).transforms["eval_transform"].processor.save_pretrained(tmp_path / "theirs")
        return model.eval(), tmp_path / "theirs"

    return save


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_trains_with_its_own_transforms_and_tokenizer(family, gradient_checkpointing):
    model = hf_model(family, gradient_checkpointing=gradient_checkpointing, learning_rate=1e-3, warmup_steps=0)
    before = weights(model)
    trainer().fit(model, datamodule=data_for(model))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    for part in ("model.vision_model", "model.text_model", "loss.logit_scale"):
        assert any(name.startswith(part) for name in moved)


@pytest.mark.parametrize("family", FAMILIES)
def test_encodes_as_transformers_does(family, folder):
    theirs, path = folder(family)
    model = HFDualEncoder(path).eval()
    pictures = cut_outs(4, 40)
    texts = ["a red square", "two", "3 dogs", "x"]
    mask = {} if family == "clip" else {"return_attention_mask": False}
    inputs = transformers.AutoImageProcessor.from_pretrained(path)(images=pictures, return_tensors="pt")
    tokens = transformers.AutoTokenizer.from_pretrained(path)
    inputs |= tokens(texts, padding="max_length", max_length=20, truncation=True, return_tensors="pt", **mask)
    outputs = theirs(**inputs)
    pairs = ImageTextDataset(pictures, texts, **model.transforms)
    batch = next(iter(torch.utils.data.DataLoader(pairs, batch_size=4)))
    with torch.no_grad():
        embedded = model.embed(batch)
    torch.testing.assert_close(embedded.image_embeddings, outputs.image_embeds)
    torch.testing.assert_close(embedded.text_embeddings, outputs.text_embeds)


class TestScale:
    def test_comes_with_pretrained_weights(self, folder):
        _, path = folder("siglip", logit_scale=3.5, logit_bias=-7.0)
        model = HFDualEncoder(path, SigmoidLoss())
        assert (model.loss.logit_scale.item(), model.loss.logit_bias.item()) == (3.5, -7.0)
        assert not model.model.logit_scale.requires_grad
        assert not model.model.logit_bias.requires_grad

    def test_is_the_losss_own_without_weights(self, folder):
        _, path = folder("clip", logit_scale=3.5)
        assert HFDualEncoder(path, InfoNCELoss(2.0)).loss.logit_scale.item() == 2.0
        assert HFDualEncoder(path).loss.logit_scale.item() == 3.5
        assert HFDualEncoder(path, pretrained=False).loss.logit_scale.item() != 3.5

    def test_comes_with_a_loss_that_is_set_later(self, folder):
        _, path = folder("siglip", logit_scale=3.5, logit_bias=-7.0)
        model = HFDualEncoder(path)
        model.loss = SigmoidLoss()
        assert (model.loss.logit_scale.item(), model.loss.logit_bias.item()) == (3.5, -7.0)
        with torch.no_grad():
            model.loss.logit_scale.fill_(3.0)  # as training does
        model.loss = SigmoidLoss(hardness=3)
        assert (model.loss.logit_scale.item(), model.loss.logit_bias.item()) == (3.0, -7.0)

    @pytest.mark.parametrize("pretrained", [True, False])
    def test_of_a_checkpoint_comes_with_a_loss_that_is_set_later(self, folder, tmp_path, pretrained):
        _, path = folder("siglip", logit_scale=3.5, logit_bias=-7.0)
        model = HFDualEncoder(path, SigmoidLoss(), pretrained=pretrained, learning_rate=1e-2, warmup_steps=0)
        fit = trainer(max_epochs=-1, max_steps=2)
        fit.fit(model, datamodule=data_for(model))
        fit.save_checkpoint(tmp_path / "last.ckpt")
        again = HFDualEncoder.load_from_checkpoint(tmp_path / "last.ckpt")
        again.loss = SigmoidLoss(hardness=3)
        learned = model.loss.logit_scale.item(), model.loss.logit_bias.item()
        assert (again.loss.logit_scale.item(), again.loss.logit_bias.item()) == learned != (3.5, -7.0)

    def test_of_a_checkpoint_that_learned_none_is_the_losss_own(self, folder, tmp_path):
        _, path = folder("siglip")
        model = HFDualEncoder(path, TripletLoss(), pretrained=False)
        fit = trainer(max_epochs=-1, max_steps=1)
        fit.fit(model, datamodule=data_for(model))
        fit.save_checkpoint(tmp_path / "last.ckpt")
        again = HFDualEncoder.load_from_checkpoint(tmp_path / "last.ckpt")
        again.loss = SigmoidLoss()
        assert (again.loss.logit_scale.item(), again.loss.logit_bias.item()) == (pytest.approx(math.log(10)), -10.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_goes_back_to_transformers_with_what_it_learned(family, tmp_path):
    """The round trip: two steps, a folder, `AutoModel`."""
    model = hf_model(family, SigmoidLoss(), learning_rate=1e-2, warmup_steps=0)
    trainer(max_epochs=-1, max_steps=2).fit(model, datamodule=data_for(model))
    before = weights(model)
    model.save_pretrained(tmp_path / "tuned")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "saving changes nothing"
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "tuned").eval()
    assert torch.equal(theirs.logit_scale.squeeze(), model.loss.logit_scale)
    if family != "clip":
        assert torch.equal(theirs.logit_bias.squeeze(), model.loss.logit_bias)
    batch = batch_of(model)
    again = HFDualEncoder(tmp_path / "tuned", SigmoidLoss())
    assert batch_of(again).keys() == batch.keys()
    with torch.no_grad():
        pairs, same = model.eval().embed(batch), again.eval().embed(batch_of(again))
    assert torch.equal(pairs.image_embeddings, same.image_embeddings)
    assert torch.equal(pairs.text_embeddings, same.text_embeddings)
    assert torch.equal(again.loss.logit_scale, model.loss.logit_scale) or family == "clip"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trained_parameter_gets_a_gradient(family):
    """Or DDP would stop."""
    model = hf_model(family)
    model.training_step(batch_of(model), 0).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_have_the_gradient_of_the_whole_batch(family):
    gradients = []
    for chunk_size in (None, 3):
        torch.manual_seed(2)
        model = hf_model(family, chunk_size=chunk_size)
        model.training_step(batch_of(model), 0).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_locked_tower_stays_as_it_is(family, tower):
    model = hf_model(family, learning_rate=1e-2, warmup_steps=0, **{f"lock_{tower}": True})
    batch = batch_of(model)
    before = model.eval().embed(batch)
    trainer(limit_val_batches=0).fit(model.train(), datamodule=data_for(model))
    after = model.eval().embed(batch)
    locked, other = f"{tower}_embeddings", {"image": "text_embeddings", "text": "image_embeddings"}[tower]
    assert torch.equal(getattr(before, locked), getattr(after, locked))
    assert not torch.equal(getattr(before, other), getattr(after, other))


@pytest.mark.parametrize("family", FAMILIES)
def test_towers_share_out_all_parameters(family):
    model = hf_model(family)
    towers = {name: {id(p) for p in tower.parameters()} for name, tower in model.towers().items()}
    assert list(towers) == ["image", "text"]
    assert not towers["image"] & towers["text"]
    rest = {name for name, p in model.model.named_parameters() if id(p) not in towers["image"] | towers["text"]}
    assert rest <= {"logit_scale", "logit_bias"}
    assert {id(p) for p in model.model.vision_model.parameters()} <= towers["image"]


def test_layer_decay_counts_the_layers_of_each_tower():
    model = hf_model("clip", layer_decay=0.5, learning_rate=1.0)
    rates = {id(p): group["lr"] for group in model.parameter_groups() for p in group["params"]}
    vision = model.model.vision_model
    assert rates[id(vision.embeddings.patch_embedding.weight)] == 1 / 8
    assert rates[id(vision.pre_layrnorm.weight)] == 1 / 8
    assert [rates[id(layer.mlp.fc1.weight)] for layer in vision.encoder.layers] == [1 / 4, 1 / 2]
    assert rates[id(model.model.visual_projection.weight)] == 1
    assert [rates[id(layer.mlp.fc1.weight)] for layer in model.model.text_model.encoder.layers] == [1 / 4, 1 / 2]


class TestBesideCallbacks:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("inject", ["samples", "embeddings", "batches"])
    def test_mining(self, family, inject):
        model = hf_model(family, TripletLoss(), learning_rate=1e-3, chunk_size=4)
        options = {"group_size": 2} if inject == "batches" else {}
        mining = OfflineHardNegativeMining(texts_per_image=6, images_per_text=4, inject=inject, **options)
        fitter = trainer(callbacks=[mining], max_epochs=2)
        fitter.fit(model, datamodule=data_for(model))
        assert fitter.callback_metrics["train/loss"].isfinite()

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("gradient_checkpointing", [False, True])
    def test_bank_and_monitor(self, family, gradient_checkpointing):
        options = {"learning_rate": 1e-3, "warmup_steps": 0, "gradient_checkpointing": gradient_checkpointing}
        model = hf_model(family, TripletLoss(), **options)
        memory, monitor = FalseNegativeElimination(queue_size=16, momentum=0.5, start_epoch=0), GradientNormMonitor()
        fitter = trainer(callbacks=[memory, monitor], max_epochs=2)
        fitter.fit(model, datamodule=data_for(model))
        assert list(monitor.towers) == ["image", "text"]
        assert fitter.callback_metrics["gradient/image_norm"] > 0
        assert fitter.callback_metrics["gradient/text_norm"] > 0
        batch = batch_of(model)
        with torch.no_grad():
            slow, live = memory.encoder(batch), model.eval().embed(batch)
        assert not torch.equal(slow.text_embeddings, live.text_embeddings)

    def test_zero_shot(self):
        model = hf_model()
        transform = model.transforms["eval_transform"]
        images = torch.stack([transform(picture) for picture in cut_outs(4, 40)])
        result = zero_shot_accuracy(model, [(images, torch.arange(4))], ["a", "b", "c", "d"])
        assert 0 <= result["top1"] <= 100


class TestCheckpoint:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_loads_by_itself(self, family, tmp_path, folder, monkeypatch):
        _, path = folder(family)
        model = HFDualEncoder(path, lock_image=True, augmentation=None, learning_rate=1e-3)
        fitter = trainer()
        fitter.fit(model, datamodule=data_for(model))
        fitter.save_checkpoint(tmp_path / "a.ckpt")
        shutil.rmtree(path)  # nothing can be read from there any more
        loaded = HFDualEncoder.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
        assert loaded.hparams == model.hparams
        assert "loss" not in loaded.hparams
        one, other = batch_of(model), batch_of(loaded)
        with torch.no_grad():
            before, after = model.eval().embed(one), loaded.eval().embed(other)
        assert torch.equal(before.image_embeddings, after.image_embeddings)
        assert torch.equal(before.text_embeddings, after.text_embeddings)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(self, family, tmp_path):
        def fit(max_epochs, ckpt_path=None):
            L.seed_everything(3, verbose=False)
            crop = {"scale": (0.5, 1.0)} if family != "siglip2" else None
            model = PlainOptimizer(config=CONFIGS[family], tokenizer=tokenizer(family), augmentation=crop)
            fitter = trainer(max_epochs=max_epochs)
            fitter.fit(model, datamodule=data_for(model), ckpt_path=ckpt_path, weights_only=True)
            fitter.save_checkpoint(tmp_path / f"{max_epochs}.ckpt")
            return model.state_dict()

        whole = fit(2)
        fit(1)
        resumed = fit(2, tmp_path / "1.ckpt")
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())

    def test_a_tokenizer_that_is_given_counts_more_than_that_of_the_checkpoint(self, tmp_path):
        model = hf_model("clip")
        fitter = trainer()
        fitter.fit(model, datamodule=data_for(model))
        fitter.save_checkpoint(tmp_path / "a.ckpt")
        other = tokenizer("siglip")
        loaded = HFDualEncoder.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True, tokenizer=other)
        assert loaded.transforms["tokenizer"].tokenizer is other

    def test_the_name_of_a_tokenizer_is_kept(self, tmp_path):
        tokenizer("siglip").save_pretrained(tmp_path / "words")
        model = HFDualEncoder(config=CONFIGS["siglip"], tokenizer=tmp_path / "words")
        trainer_of_nothing = trainer(limit_train_batches=0, limit_val_batches=0)
        trainer_of_nothing.fit(model, torch.utils.data.DataLoader([0]))
        trainer_of_nothing.save_checkpoint(tmp_path / "a.ckpt")  # `transforms` was never asked for
        loaded = HFDualEncoder.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
        assert loaded.transforms["tokenizer"](["a"])["input_ids"].shape == (1, 20)


class TestAugmentation:
    def test_is_of_training_only(self):
        model = hf_model("clip", augmentation={"scale": (0.1, 0.2)})
        pairs = ImageTextDataset(cut_outs(2, 40), ["a", "b"], **model.transforms)
        first = pairs[0]["image"]
        assert first.shape == (3, 32, 32)
        assert not torch.equal(first, pairs[0]["image"])
        assert torch.equal(pairs.evaluation()[0]["image"], model.transforms["eval_transform"](cut_outs(2, 40)[0]))

    @pytest.mark.skipif("siglip2" not in FAMILIES, reason="this release of transformers has no SigLIP 2")
    def test_needs_a_fixed_size(self):
        with pytest.raises(ValueError, match="fixed height and width for `augmentation`, got Siglip2ImageProcessor"):
            hf_model("siglip2", augmentation={"scale": (0.5, 1)}).transforms  # noqa: B018


class TestErrors:
    def test_neither_name_nor_config(self):
        with pytest.raises(ValueError, match=r"`model_name`, such as .* got neither"):
            HFDualEncoder()

    def test_a_config_of_no_type(self):
        with pytest.raises(ValueError, match=r"'model_type', such as 'clip' or 'siglip', got \['a'\]"):
            HFDualEncoder(config={"a": 1})

    def test_a_model_without_towers(self):
        config = {
            "model_type": "bert",
            "num_hidden_layers": 1,
            "hidden_size": 8,
            "num_attention_heads": 1,
            "vocab_size": 9,
        }
        with pytest.raises(ValueError, match="got BertModel, which has no `get_image_features`"):
            HFDualEncoder(config=config)

    def test_texts_that_are_no_tokens(self):
        with pytest.raises(TypeError, match=r"token ids .* got list\. Give HFDualEncoder a `tokenizer`"):
            HFDualEncoder(config=CONFIGS["clip"]).encode_text(["a"])

    def test_layer_decay(self):
        with pytest.raises(ValueError, match=r"`layer_decay` to be in \(0, 1\], got 2"):
            hf_model(layer_decay=2)

    def test_without_transformers(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ImportError, match=r'pip install "lightning_itm\[hf\]"'):
            hf_model()

    def test_a_hub_that_does_not_answer(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(Exception, match="offline"):
            hf_model().push_to_hub("somebody/some-model")


def test_long_captions_are_cut_and_counted_once():
    model = hf_model()
    pairs = ImageTextDataset(cut_outs(2, 40), ["a very long caption of two dogs", "a dog"], **model.transforms)
    with pytest.warns(UserWarning, match="Text 0 is longer than 20 tokens, the context length"):
        pairs[0]
    pairs[0], pairs[1]
    assert pairs.num_cut == 1
    assert pairs[0]["text"]["input_ids"].shape == (20,)


@pytest.mark.parametrize(("family", "mask"), [("clip", True), ("siglip", False), ("siglip2", False)])
def test_padding_is_that_of_the_family(family, mask):
    if family not in FAMILIES:
        pytest.skip("this release of transformers has no SigLIP 2")
    text = hf_model(family).transforms["tokenizer"](["a dog", "b"])
    assert text["input_ids"].shape == (2, 20)
    assert ("attention_mask" in text) == mask
