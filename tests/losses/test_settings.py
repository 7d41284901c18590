import io

import numpy as np
import pytest
import torch

from lightning_itm import InfoNCELoss, QuintupletLoss, SigmoidLoss, TripletLoss
from lightning_itm.losses import loss_settings, make_loss

# Each argument has another value than its default.
LOSSES = [
    InfoNCELoss(2.0, hardness=3.0, relative_margin=0.05, reduction="sum"),
    InfoNCELoss(),
    SigmoidLoss(2.0, -3.0, hardness=3.0, relative_margin=0.05, reduction="sum"),
    SigmoidLoss(init_logit_bias=-4.0),
    TripletLoss(0.1, "selective", epsilon=0.02, memory="instead", reduction="sum"),
    QuintupletLoss(
        TripletLoss(0.3, "mean"),
        offline_margin=0.1,
        alpha=0.2,
        beta=1.0,
        as_published=True,
        mask_matched=False,
        reduction="sum",
    ),
]


def attributes(loss):
    """All that a loss is made of: its own attributes, its weights, and those of the losses in it."""
    plain = {name: value for name, value in vars(loss).items() if not name.startswith("_") and name != "training"}
    return {
        **plain,
        **{name: value.item() for name, value in loss.state_dict().items()},
        **{name: (type(part), attributes(part)) for name, part in loss.named_children()},
    }


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_the_same_loss_is_made_again(loss):
    file = io.BytesIO()
    torch.save(loss_settings(loss), file)
    file.seek(0)
    made = make_loss(torch.load(file, weights_only=True))
    assert type(made) is type(loss)
    assert attributes(made) == attributes(loss)


def test_settings_are_those_of_now_as_numbers_of_python():
    loss = TripletLoss(np.float64(0.1))
    loss.reduction, loss.epsilon = "sum", torch.tensor(0.5)
    settings = loss_settings(loss)
    assert settings == {
        "class": "TripletLoss",
        "margin": 0.1,
        "negatives": "hardest",
        "epsilon": 0.5,
        "memory": "added",
        "reduction": "sum",
    }
    assert {type(value) for value in settings.values()} == {str, float}


class Own(TripletLoss):
    pass


@pytest.mark.parametrize(
    "loss", [torch.nn.MSELoss(), Own(), QuintupletLoss(Own())], ids=["torch", "subclass", "inside"]
)
def test_a_loss_of_ones_own_has_none(loss):
    assert loss_settings(loss) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class": "NewLoss"}, r"a loss among InfoNCELoss, .* got 'NewLoss', perhaps of a newer version"),
        ({"class": "TripletLoss", "new": 1}, r"arguments of TripletLoss, got 'new', perhaps of a newer version"),
    ],
)
def test_of_a_newer_version(settings, message):
    with pytest.raises(ValueError, match=message):
        make_loss(settings)
