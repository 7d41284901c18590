import copy

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_itm import InfoNCELoss, TripletLoss, interpolate_weights
from tests.helpers.tiny import SILENT, Tiny, tiny_data


def weights(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    names = ("image_encoder.0.weight", "text_encoder.weight")
    floats = {name: torch.randn(5, 3, generator=generator).to(dtype) for name in names}
    return {**floats, "image_encoder.1.num_batches_tracked": torch.tensor(seed)}


@given(fraction=st.floats(0, 1), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
def test_is_the_formula(fraction, dtype):
    before, after = weights(1, dtype), weights(2, dtype)
    mixed = interpolate_weights(before, after, fraction)
    assert list(mixed) == list(after)
    for name, value in mixed.items():
        assert value.dtype == after[name].dtype
        if name.endswith("tracked"):
            assert value == 2
        else:
            expected = (1 - fraction) * before[name].double() + fraction * after[name].double()
            torch.testing.assert_close(value, expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends_are_exact_and_nothing_is_shared(dtype):
    before, after = weights(1, dtype), weights(2, dtype)
    for fraction, end in ((0.0, before), (1.0, after)):
        mixed = interpolate_weights(before, after, fraction)
        assert all(torch.equal(mixed[name], end[name]) for name in end if not name.endswith("tracked"))
        assert all(mixed[name].data_ptr() != after[name].data_ptr() for name in after)


def test_half_precision_is_mixed_in_float32():
    before, after = {"weight": torch.full((1,), 60000.0).half()}, {"weight": torch.full((1,), -60000.0).half()}
    assert interpolate_weights(before, after, 0.5)["weight"] == 0, "the difference is no float16"


def test_the_loss_is_the_fine_tuned():
    torch.manual_seed(0)
    zero_shot, fine_tuned = Tiny(InfoNCELoss(2.0)), Tiny(TripletLoss())
    fine_tuned.load_state_dict(interpolate_weights(zero_shot.state_dict(), fine_tuned.state_dict(), 0.5))
    mixed = interpolate_weights(fine_tuned.state_dict(), zero_shot.state_dict(), 0.5)
    assert mixed["loss.logit_scale"] == 2.0
    other = Tiny(InfoNCELoss(4.0))
    assert interpolate_weights(other.state_dict(), zero_shot.state_dict(), 0.0)["loss.logit_scale"] == 2.0


def test_before_and_after_a_fit():
    model = Tiny()
    before = copy.deepcopy(model.state_dict())
    L.Trainer(**SILENT, max_epochs=1).fit(model, datamodule=tiny_data())
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(interpolate_weights(before, after, 0.5))
    assert torch.equal(model.text_encoder.weight, before["text_encoder.weight"].lerp(after["text_encoder.weight"], 0.5))
    assert model.image_encoder[2].num_batches_tracked == after["image_encoder.2.num_batches_tracked"] > 0


def test_parameters_that_require_a_gradient():
    layer = nn.Linear(2, 2)
    mixed = interpolate_weights(dict(layer.named_parameters()), dict(layer.named_parameters()), 0.3)
    assert not any(value.requires_grad for value in mixed.values())


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_a_fraction_outside_its_range(fraction):
    with pytest.raises(ValueError, match=rf"`fraction` to be in \[0, 1\].* got {fraction}"):
        interpolate_weights({}, {}, fraction)


def test_weights_of_another_model():
    before, after = weights(1), weights(2)
    with pytest.raises(ValueError, match=r"1 names .* 'model.logit_bias' \(of the fine-tuned\)\. Take both"):
        interpolate_weights(before, {**after, "model.logit_bias": torch.zeros(())}, 0.5)
    with pytest.raises(ValueError, match=r"6 names .* such as 'image_encoder.0.weight' \(of the fine-tuned\)"):
        interpolate_weights({f"module.{name}": value for name, value in before.items()}, after, 0.5)
    with pytest.raises(
        ValueError, match=r"\(4, 3\) \(zero-shot\) and \(5, 3\) \(fine-tuned\) for 'text_encoder.weight'"
    ):
        interpolate_weights({**before, "text_encoder.weight": torch.zeros(4, 3)}, after, 0.5)
