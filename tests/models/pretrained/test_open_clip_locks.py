import lightning as L
import pytest
import torch

from lightning_itm import OpenCLIPDualEncoder
from tests.helpers.open_clip_models import CONFIGS, data_for, register
from tests.helpers.tiny import SILENT


@pytest.fixture(scope="module", autouse=True)
def _registered(tmp_path_factory):
    register(CONFIGS, tmp_path_factory.mktemp("configs"))


def trained_names(tower):
    return {name for name, parameter in tower.named_parameters() if parameter.requires_grad}


def test_the_last_groups_of_an_image_tower_stay_trainable():
    towers = [
        OpenCLIPDualEncoder("tiny-vit", lock_image=True, unlocked_groups=number).model.visual for number in range(3)
    ]
    assert trained_names(towers[0]) == set()
    assert trained_names(towers[1]) == {"proj"}
    names = trained_names(towers[2])
    assert {name.rpartition(".")[0] for name in names} >= {"ln_post", "transformer.resblocks.1.mlp.c_fc"}
    assert not any(name.startswith(("conv1", "transformer.resblocks.0")) for name in names)


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-bias"])
def test_the_last_groups_of_a_text_tower_stay_trainable(name, tmp_path):
    model = OpenCLIPDualEncoder(name, lock_text=True, unlocked_groups=2, learning_rate=1e-2, warmup_steps=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fitter = L.Trainer(**SILENT, max_steps=2, limit_val_batches=0)
    fitter.fit(model, datamodule=data_for(model))
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    moved = {key.removeprefix("model.").removeprefix("text.") for key in moved if "visual" not in key}
    assert any(key.startswith("transformer.resblocks.1") for key in moved)
    assert not any(key.startswith(("token_embedding", "transformer.resblocks.0")) for key in moved)
    fitter.save_checkpoint(tmp_path / "a.ckpt")
    loaded = OpenCLIPDualEncoder.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert trained_names(loaded) == trained_names(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unlocked_groups": 1}, "`lock_image=True` or `lock_text=True` with `unlocked_groups=1`, got neither"),
        ({"unlocked_groups": -1, "lock_image": True}, "at least 0, got -1"),
    ],
)
def test_groups_that_can_not_be_unlocked(options, message):
    with pytest.raises(ValueError, match=message):
        OpenCLIPDualEncoder("tiny-vit", **options)


def test_a_resnet_is_locked_as_a_whole():
    with pytest.raises(ValueError, match="`unlocked_groups=0` with the ResNet of open_clip, got 1"):
        OpenCLIPDualEncoder("tiny-rn", lock_image=True, unlocked_groups=1)
