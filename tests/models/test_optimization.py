from collections import Counter

import lightning as L
import pytest
import timm
import torch
from torch import nn

from lightning_itm import OpenCLIPDualEncoder, SigmoidLoss, TripletLoss
from lightning_itm.models.optimization import layer_depths
from tests.helpers.open_clip_models import CONFIGS, TEXT, data_for, register
from tests.helpers.tiny import SILENT


def with_trunk(name, pool, proj):
    vision = {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": pool, "timm_proj": proj}
    return {"embed_dim": 24, "vision_cfg": {**vision, "image_size": 64}, "text_cfg": TEXT, "custom_text": True}


TRUNKS = {
    "tiny-trunk-vit": with_trunk("test_vit", "map", "none"),
    "tiny-trunk-convnext": with_trunk("test_convnext", "", "mlp"),
    "tiny-trunk-resnet": with_trunk("test_resnet", "avg", "linear"),
}
FAMILIES = {**CONFIGS, **TRUNKS}


@pytest.fixture(scope="module", autouse=True)
def _registered(tmp_path_factory):
    register(FAMILIES, tmp_path_factory.mktemp("configs"))


IMAGE = {  # name, and depth, of parameters of each kind
    "tiny-vit": {"conv1.weight": 3, "class_embedding": 3, "positional_embedding": 3, "ln_pre.weight": 3}
    | {"transformer.resblocks.0.mlp.c_fc.weight": 2, "transformer.resblocks.1.ln_1.bias": 1, "ln_post.bias": 0, "proj": 0},
    "tiny-coca": {"conv1.weight": 2, "transformer.resblocks.0.ln_1.bias": 1, "attn_pool.query": 0, "proj": 0},
    "tiny-rn": {"conv1.weight": 5, "bn3.bias": 5, "layer1.0.conv1.weight": 4, "layer3.0.downsample.0.weight": 2}
    | {"layer4.0.bn3.weight": 1, "attnpool.positional_embedding": 0, "attnpool.c_proj.weight": 0},
    "tiny-trunk-vit": {"trunk.pos_embed": 7, "trunk.cls_token": 7, "trunk.patch_embed.proj.bias": 7}
    | {"trunk.blocks.0.attn.qkv.weight": 6, "trunk.blocks.5.norm1.weight": 1, "trunk.attn_pool.latent": 0},
    # 1, 2, 4 and 2 blocks
    "tiny-trunk-convnext": {"trunk.stem.0.weight": 10, "trunk.stages.0.blocks.0.conv_dw.weight": 9}
    | {"trunk.stages.2.downsample.1.weight": 6, "trunk.stages.2.blocks.1.mlp.fc1.weight": 5}
    | {"trunk.stages.3.blocks.0.gamma": 2, "head.mlp.fc1.weight": 0},
    "tiny-trunk-resnet": {"trunk.conv1.0.weight": 5, "trunk.layer1.0.conv2.weight": 4, "trunk.layer4.0.bn1.bias": 1}
    | {"head.proj.weight": 0},
}  # fmt: skip
BLOCKS = {"transformer.resblocks.0.mlp.c_fc.weight": 2, "transformer.resblocks.1.ln_1.bias": 1, "ln_final.bias": 0}
PLAIN_TEXT = {"token_embedding.weight": 3, "positional_embedding": 3, **BLOCKS, "text_projection": 0}


@pytest.mark.parametrize("name", IMAGE)
def test_depth_of_an_image_tower(name):
    depths = layer_depths(OpenCLIPDualEncoder(name).towers()["image"])
    assert {parameter: depths.get(parameter) for parameter in IMAGE[name]} == IMAGE[name]


@pytest.mark.parametrize(("name", "own"), [("tiny-vit", PLAIN_TEXT), ("tiny-rn", PLAIN_TEXT)])
def test_depth_of_a_text_tower_over_the_model(name, own):
    depths = layer_depths(OpenCLIPDualEncoder(name).towers()["text"])
    assert {parameter: depths.get(parameter) for parameter in own} == own


@pytest.mark.parametrize("name", ["tiny-coca", "tiny-bias", "tiny-trunk-vit"])
def test_depth_of_a_text_tower_of_its_own(name):
    own = {f"text.{key}": depth for key, depth in {"token_embedding.weight": 3, **BLOCKS}.items()}
    own |= {"text.cls_emb": 3} if name == "tiny-coca" else {}
    depths = layer_depths(OpenCLIPDualEncoder(name).towers()["text"])
    assert {parameter: depths.get(parameter) for parameter in own} == own
    assert not any(parameter.startswith("text_decoder") for parameter in depths), "CoCa's captioner is frozen"


def tree(names):
    """Return a module with a parameter under each name."""
    root = nn.Module()
    for name in names:
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, nn.Parameter(torch.zeros(1)))
    return root


@pytest.mark.parametrize(
    "depths",
    [
        {"text.transformer.embeddings.word_embeddings.weight": 3, "text.transformer.encoder.layer.0.output.dense.bias": 2}
        | {"text.transformer.encoder.layer.1.output.dense.bias": 1, "text.transformer.pooler.dense.bias": 0}
        | {"text.proj.0.weight": 0},
        {"text.transformer.shared.weight": 3, "text.transformer.encoder.block.0.layer.1.DenseReluDense.wo.weight": 2}
        | {"text.transformer.encoder.block.1.layer.0.SelfAttention.q.weight": 1}
        | {"text.transformer.encoder.final_layer_norm.weight": 0},
    ],
    ids=["BERT", "T5"],
)  # fmt: skip
def test_depth_in_hugging_face_towers(depths):
    """By their names: the library they come from is no dependency."""
    assert layer_depths(tree(depths)) == depths


@pytest.mark.parametrize(
    ("trunk", "num_blocks", "top"),
    [
        ("vit_base_patch16_siglip_224", 12, {"norm", "attn_pool"}),
        ("vit_base_mci_224", 12, {"norm", "head"}),
        ("eva02_base_patch16_clip_224", 12, {"norm", "head"}),
        ("vit_pe_core_base_patch16_224", 12, {"norm", "attn_pool", "head"}),
        ("vitamin_small_224", 14, {"fc_norm", "head"}),  # of the transformer; its convolutions are the stem
        ("convnext_tiny", 3 + 3 + 9 + 3, {"head"}),
        ("swin_base_patch4_window7_224", 2 + 2 + 18 + 2, {"norm", "head"}),
        ("fastvit_mci0", 2 + 6 + 10 + 2, {"final_conv", "head"}),
        ("resnet50", 3 + 4 + 6 + 3, {"fc"}),
    ],
)
def test_depth_in_large_trunks(trunk, num_blocks, top):
    with torch.device("meta"):
        depths = layer_depths(timm.create_model(trunk))
    assert set(depths.values()) == set(range(num_blocks + 2))
    assert {name.split(".")[0] for name, depth in depths.items() if depth == 0} == top


LOCKS = [{}, {"lock_image": True}, {"lock_text": True}]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("locks", LOCKS, ids=lambda locks: next(iter(locks), "none"))
def test_every_parameter_has_one_group_and_the_rate_of_the_formula(name, locks):
    model = OpenCLIPDualEncoder(name, loss=SigmoidLoss(), learning_rate=2e-4, layer_decay=0.7, **locks)
    groups = model.parameter_groups()
    seen = Counter(id(parameter) for group in groups for parameter in group["params"])
    assert seen == Counter(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    plain = OpenCLIPDualEncoder(name, loss=SigmoidLoss(), **locks).parameter_groups()
    assert len(plain) == 2
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    towers = {"image": model.model.visual, "text": model.towers()["text"]}
    for side, tower in towers.items():
        depths = layer_depths(tower)
        # open_clip locks a timm trunk without the projection on it
        assert (max(depths.values(), default=0) == 0) == locks.get(f"lock_{side}", False)
        for parameter_name, parameter in tower.named_parameters():
            if parameter.requires_grad:
                assert rate[id(parameter)] == pytest.approx(2e-4 * 0.7 ** depths[parameter_name])
    assert rate[id(model.loss.logit_scale)] == rate[id(model.loss.logit_bias)] == 2e-4
    for group in groups:
        exempt = {parameter.ndim < 2 for parameter in group["params"]}
        assert exempt == {group.get("weight_decay") == 0.0}


@pytest.mark.parametrize("decay", [None, 1, 1.0])
def test_off(decay):
    groups = OpenCLIPDualEncoder("tiny-vit", layer_decay=decay).parameter_groups()
    assert len(groups) == 2
    assert all("lr" not in group for group in groups)


def test_the_schedule_multiplies_every_rate():
    rates = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    model = OpenCLIPDualEncoder("tiny-vit", loss=TripletLoss(), learning_rate=1e-3, layer_decay=0.5, warmup_steps=1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    L.Trainer(**SILENT, max_epochs=2, callbacks=[Watch()]).fit(model, datamodule=data_for(model))
    depths = torch.tensor([rate / rates[1][0] for rate in rates[1]])
    for step in rates:
        torch.testing.assert_close(torch.tensor(step), depths * step[0])
    assert rates[1][0] == 1e-3
    assert min(rates[1]) == pytest.approx(1e-3 / 8)
    moved = {name: (parameter - before[name]).abs().max().item() for name, parameter in model.named_parameters()}
    assert moved["model.visual.proj"] > 3 * moved["model.visual.conv1.weight"] > 0


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.01])
def test_a_decay_that_is_none(decay):
    with pytest.raises(ValueError, match=rf"`layer_decay` to be in \(0, 1\], got {decay}\. .* `lock_image`"):
        OpenCLIPDualEncoder("tiny-vit", layer_decay=decay)
