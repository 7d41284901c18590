"""Where selective hard negatives come from: at a cold start the hardest negative contracts, the mean expands."""

import lightning as L
import pytest

from tests.helpers.latent import make_run, measure
from tests.helpers.tiny import SILENT


def train(negatives, seed):
    model, loader, held_out = make_run(seed, negatives)
    L.Trainer(max_epochs=1, gradient_clip_val=2.0, **SILENT).fit(model, loader)
    return measure(model, held_out)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("seed", range(5))
def test_hardest_collapses_and_selective_escapes(seed):
    hardest, hardest_spread = train("hardest", seed)
    selective, selective_spread = train("selective", seed)
    assert hardest > 0.195
    assert hardest_spread < 0.02
    assert selective < 0.13
    assert selective_spread > 0.5
