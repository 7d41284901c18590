import copy
import json
import sys

import lightning as L
import open_clip
import pytest
import torch
from torch import nn

from lightning_itm import (
    FalseNegativeElimination,
    GradientNormMonitor,
    HFDualEncoder,
    OpenCLIPDualEncoder,
    TripletLoss,
    interpolate_weights,
)
from tests.helpers import hugging_face, open_clip_models
from tests.helpers.hugging_face import FAMILIES, hf_model, transformers
from tests.helpers.tiny import SILENT

pytest.importorskip("peft")
OPEN_CLIP = ["tiny-vit", "tiny-bias", "tiny-coca"]
EVERY = [*OPEN_CLIP, *FAMILIES]


@pytest.fixture(scope="module", autouse=True)
def _registered(tmp_path_factory):
    open_clip_models.register(open_clip_models.CONFIGS, tmp_path_factory.mktemp("configs"))


def make(name, lora=4, **kwargs):
    kwargs = {"lora": lora, "learning_rate": 1e-2, "warmup_steps": 0, **kwargs}
    return OpenCLIPDualEncoder(name, **kwargs) if name in open_clip_models.CONFIGS else hf_model(name, **kwargs)


def data_for(model):
    helpers = open_clip_models if isinstance(model, OpenCLIPDualEncoder) else hugging_face
    return helpers.data_for(model)


def batch_of(model):
    return next(iter(data_for(model).val_dataloader()))


def trainer(**options):
    return L.Trainer(**{**SILENT, "max_epochs": 1, "limit_val_batches": 0, **options})


def adapters(model):
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def trained(model, epochs=1, **options):
    fitter = trainer(max_epochs=epochs, **options)
    fitter.fit(model, datamodule=data_for(model))
    return fitter


@torch.no_grad()
def embed(model, batch):
    pairs = model.eval().embed(batch)
    return pairs.image_embeddings, pairs.text_embeddings


@pytest.mark.parametrize("name", EVERY)
def test_only_adapters_and_the_scale_are_trained(name):
    model = make(name)
    before = {key: value.clone() for key, value in model.named_parameters()}
    plain = embed(make_plain_of(model, name), batch_of(model))
    torch.testing.assert_close(embed(model, batch_of(model)), plain)  # they start at zero
    trained(model.train(), epochs=2)
    # NaN is equal to itself: CoCa's captioner has a weight that nobody uses or sets.
    now = dict(model.named_parameters())
    moved = {key for key in now if not torch.allclose(now[key], before[key], rtol=0, atol=0, equal_nan=True)}
    moved -= {"model.logit_scale"}  # which gets that of the loss, and is not trained
    assert moved == {*adapters(model), "loss.logit_scale"}
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def make_plain_of(model, name):
    """The same weights without adapters."""
    plain = make(name, lora=None)
    own = {key.replace(".base_layer", ""): value for key, value in model.state_dict().items() if "lora_" not in key}
    plain.load_state_dict(own)
    return plain


@pytest.mark.parametrize("name", EVERY)
def test_the_merged_model_embeds_alike(name):
    model = make(name)
    trained(model, epochs=2)
    merged, batch = model.merged().eval(), batch_of(model)
    assert merged.state_dict().keys() == make(name, lora=None).model.state_dict().keys()
    assert merged.logit_scale.item() == model.loss.logit_scale.item()
    plain = make(name, lora=None)
    plain.model = merged  # which gets the scale of this one's loss
    for ours, theirs in zip(embed(model, batch), embed(plain, batch), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_attention_with_adapters_is_that_of_the_sum_and_has_its_gradient():
    """In `peft` itself the output projection counts twice, and once in the gradient."""
    model = make("tiny-vit", lora={"image": {"rank": 2, "alpha": 6}})
    attention = model.model.visual.transformer.resblocks[0].attn
    for name, p in adapters(model).items():
        nn.init.normal_(p, std=0.2) if "lora_B" in name else None
    plain = nn.MultiheadAttention(32, 2, batch_first=True)
    base, out = attention.base_layer, attention.base_layer.out_proj
    deltas = [3 * (part.lora_B["default"].weight @ part.lora_A["default"].weight) for part in (attention, out)]
    with torch.no_grad():
        plain.in_proj_weight.copy_(base.in_proj_weight + deltas[0])
        plain.out_proj.weight.copy_(out.base_layer.weight + deltas[1])
        plain.in_proj_bias.copy_(base.in_proj_bias)
        plain.out_proj.bias.copy_(out.base_layer.bias)
    x = torch.randn(3, 5, 32)
    ours, theirs = attention(x, x, x)[0], plain(x, x, x)[0]
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    expected = 3 * plain.out_proj.weight.grad @ out.lora_A["default"].weight.T
    torch.testing.assert_close(out.lora_B["default"].weight.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny-vit", "clip"])
def test_the_norms_of_the_monitor_are_those_of_the_adapters(name):
    model = make(name, loss=TripletLoss())
    monitor = GradientNormMonitor()
    seen = {}

    class Norms(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for kind, tower in pl_module.towers().items():
                own = [p.grad for key, p in tower.named_parameters() if "lora_" in key]
                assert own
                seen[kind] = torch.cat([gradient.flatten() for gradient in own]).norm()

    fitter = trained(model, max_steps=1, callbacks=[monitor, Norms()])
    for kind in ("image", "text"):
        torch.testing.assert_close(fitter.callback_metrics[f"gradient/{kind}_norm"], seen[kind])


@pytest.mark.parametrize("name", ["tiny-vit", "clip"])
def test_the_copy_of_the_bank_follows_the_adapters(name):
    model = make(name)
    memory = FalseNegativeElimination(queue_size=16, momentum=0.5, start_epoch=0)
    trained(model, epochs=2, callbacks=[memory])
    slow, batch = memory.encoder.module, batch_of(model)
    for key, p in adapters(model).items():
        assert not torch.equal(dict(slow.named_parameters())[key], p)
    frozen = {key: p for key, p in model.named_parameters() if "lora_" not in key and "logit_" not in key}
    assert all(torch.equal(dict(slow.named_parameters())[key], p) for key, p in frozen.items())
    assert not torch.equal(embed(slow, batch)[0], embed(model, batch)[0])


@pytest.mark.parametrize("name", ["tiny-vit", "clip"])
def test_interpolation_scales_what_the_adapters_do(name):
    model, batch = make(name), batch_of(make(name))
    zero_shot = copy.deepcopy(model.state_dict())
    before = model.merged().state_dict()
    trained(model, epochs=2)
    after = model.merged().state_dict()
    mixed = interpolate_weights(zero_shot, model.state_dict(), 0.25)
    model.load_state_dict(mixed)
    ours = model.merged().state_dict()
    expected = interpolate_weights(before, after, 0.25)
    torch.testing.assert_close(
        {key: ours[key] for key in ours if "logit" not in key},
        {key: expected[key] for key in ours if "logit" not in key},
    )
    assert all(bool(vectors.isfinite().all()) for vectors in embed(model, batch))


def test_adapters_that_did_not_start_at_zero_are_not_interpolated():
    model = make("tiny-vit")
    trained(model)
    with pytest.raises(ValueError, match=r"adapters that do nothing .* `model.merged\(\).state_dict\(\)`"):
        interpolate_weights(model.state_dict(), model.state_dict(), 0.5)


class TestCheckpoint:
    @pytest.mark.parametrize("name", ["tiny-vit", "siglip"])
    def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(self, name, tmp_path, monkeypatch):
        kind = OpenCLIPDualEncoder if name in OPEN_CLIP else HFDualEncoder
        monkeypatch.setattr(
            kind, "configure_optimizers", lambda self: torch.optim.AdamW(self.parameter_groups(), lr=1e-2)
        )

        def fit(max_epochs, ckpt_path=None):
            L.seed_everything(3, verbose=False)
            model = make(name, lora={"rank": 4, "dropout": 0.2})
            fitter = trainer(max_epochs=max_epochs)
            fitter.fit(model, datamodule=data_for(model), ckpt_path=ckpt_path, weights_only=True)
            fitter.save_checkpoint(tmp_path / f"{max_epochs}.ckpt")
            return model.state_dict()

        whole = fit(2)
        fit(1)
        resumed = fit(2, tmp_path / "1.ckpt")
        assert all(torch.equal(value, resumed[key]) for key, value in whole.items())

    @pytest.mark.parametrize("name", ["tiny-vit", "clip"])
    def test_adapters_only(self, name, tmp_path):
        """Of weights that are there: a file, and a folder."""
        torch.manual_seed(4)
        plain = make(name, lora=None)
        if name == "clip":
            plain.save_pretrained(tmp_path / "theirs")
            model = HFDualEncoder(tmp_path / "theirs", lora=4, save_adapters_only=True, learning_rate=1e-2)
        else:
            torch.save(plain.model.state_dict(), tmp_path / "weights.pt")
            model = OpenCLIPDualEncoder(
                name, tmp_path / "weights.pt", lora=4, save_adapters_only=True, learning_rate=1e-2
            )
        fitter = trained(model, epochs=2)
        fitter.save_checkpoint(tmp_path / "a.ckpt")
        saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
        assert {key for key in saved if key.startswith("model.") and "lora_" not in key} == set()
        loaded = type(model).load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
        batch = batch_of(model)
        assert all(torch.equal(one, two) for one, two in zip(embed(model, batch), embed(loaded, batch), strict=True))


def test_the_merged_model_goes_back_to_transformers(tmp_path):
    model = make("clip")
    trained(model, epochs=2)
    model.save_pretrained(tmp_path / "tuned")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "tuned")
    assert torch.equal(theirs.logit_scale, model.loss.logit_scale)
    again = HFDualEncoder(tmp_path / "tuned")
    for ours, other in zip(embed(model, batch_of(model)), embed(again, batch_of(again)), strict=True):
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=0)


def test_the_merged_model_goes_back_to_open_clip(tmp_path):
    model = make("tiny-vit")
    trained(model, epochs=2)
    torch.save(model.merged().state_dict(), tmp_path / "tuned.pt")
    model.save_pretrained(tmp_path / "tuned")
    batch = batch_of(model)
    for theirs in (
        open_clip.create_model("tiny-vit", pretrained=str(tmp_path / "tuned.pt")),
        open_clip.create_model(f"local-dir:{tmp_path / 'tuned'}"),
    ):
        with torch.no_grad():
            image = theirs.eval().encode_image(batch["image"], normalize=True)
        torch.testing.assert_close(embed(model, batch)[0], image, atol=1e-5, rtol=0)
        assert theirs.logit_scale.item() == model.loss.logit_scale.item()


class TestWhatIsAdapted:
    def test_attention_and_linear_layers_in_blocks(self):
        names = {key.split(".lora_")[0] for key in adapters(make("tiny-vit", lora={"image": 2}))}
        layers = ("attn", "attn.base_layer.out_proj", "mlp.c_fc", "mlp.c_proj")
        assert names == {f"model.visual.transformer.resblocks.{i}.{layer}" for i in range(2) for layer in layers}

    def test_of_towers_with_many_layers(self, tmp_path):
        """From twenty names on, `peft` looks for endings that stand for them."""
        config = copy.deepcopy(open_clip_models.CONFIGS["tiny-vit"])
        config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 12
        (tmp_path / "deep.json").write_text(json.dumps(config))
        model = OpenCLIPDualEncoder(tmp_path / "deep.json", lora=2)
        layers = ("attn", "attn.base_layer.out_proj", "mlp.c_fc", "mlp.c_proj")
        names = {key.split(".lora_")[0] for key in adapters(model)}
        towers = ("model.visual.transformer", "model.transformer")
        assert names == {f"{tower}.resblocks.{i}.{layer}" for tower in towers for i in range(12) for layer in layers}

    def test_the_layers_that_are_named(self):
        names = {
            key.split(".lora_")[0]
            for key in adapters(make("clip", lora={"text": {"rank": 2, "target_modules": ["q_proj"]}}))
        }
        assert names == {f"model.text_model.encoder.layers.{i}.self_attn.q_proj" for i in range(2)}

    def test_each_tower_has_its_rank(self):
        for name in ("tiny-vit", "clip"):
            model = make(name, lora={"text": 3, "image": 2})
            for kind, rank in (("image", 2), ("text", 3)):
                own = [p for key, p in model.towers()[kind].named_parameters() if "lora_A" in key]
                assert {p.shape[0] for p in own} == {rank}

    @pytest.mark.parametrize("name", ["tiny-vit", "clip"])
    def test_a_tower_that_is_not_named_is_frozen(self, name):
        model = make(name, lora={"text": 2})
        assert not any(p.requires_grad for p in model.towers()["image"].parameters())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "tiny-rn",
            {"lora": 4},
            r"image tower with attention or linear layers .* got none in ModifiedResNet\. Leave 'image' out",
        ),
        ("tiny-rn", {"lora": {"image": {"rank": 4, "target_modules": ["k_proj"]}}}, "attention pool of a ResNet"),
        ("tiny-vit", {"lora": {"image": {"rank": 4, "target_modules": "out_proj"}}}, "adapted as a whole"),
        ("tiny-vit", {"lora": {"image": {"rank": 4, "target_modules": "conv1"}}}, "it is a Conv2d"),
        (
            "tiny-vit",
            {"lora": {"image": {"rank": 4, "target_modules": "no"}}},
            r"got 'no': there is no such .* \['attn', 'c_fc'",
        ),
        ("clip", {"lora": {"text": {"rank": 4, "target_modules": "text_projection"}}}, "directly in the model"),
        ("tiny-vit", {"lora": 4, "lock_text": True}, "`lock_text=False` with adapters in the text tower, got True"),
        ("tiny-vit", {"lora": 4, "compile": True}, "`compile=False` with `lora`"),
        ("tiny-vit", {"lora": None, "save_adapters_only": True}, "Expected `lora` with"),
        ("tiny-vit", {"lora": 4, "save_adapters_only": True}, "can't be read again"),
    ],
)
def test_what_can_not_be_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, **options)


@pytest.mark.parametrize("name", ["tiny-vit", "clip"])
@pytest.mark.parametrize("options", [{"chunk_size": 3}, {"gradient_checkpointing": True}])
def test_what_saves_memory_leaves_the_gradient_as_it_is(name, options):
    gradients = []
    for more in ({}, options):
        torch.manual_seed(2)
        model = make(name, **more)
        for key, p in adapters(model).items():
            if "lora_B" in key:
                nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(key)))
        model.training_step(batch_of(model), 0).backward()
        gradients.append({key: p.grad for key, p in adapters(model).items()})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'pip install "lightning_itm\[lora\]"'):
        make("tiny-vit")
