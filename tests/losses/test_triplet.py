from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_itm import TripletLoss
from lightning_itm.embeddings import EmbeddingPairs
from tests.helpers.pairs import make_pairs

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("selhn_*.npz"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_selective_equals_the_published_code(path):
    golden = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
    image, text = golden["image"].requires_grad_(), golden["text"].requires_grad_()
    ids = torch.arange(len(image))
    loss = TripletLoss(float(golden["margin"]), "selective", epsilon=float(golden["epsilon"]))
    outputs = loss(EmbeddingPairs(image, text, ids, ids))
    outputs["loss"].backward()
    torch.testing.assert_close(outputs["loss"], golden["loss"], atol=1e-10, rtol=0)
    torch.testing.assert_close(image.grad, golden["grad_image"], atol=1e-10, rtol=0)
    torch.testing.assert_close(text.grad, golden["grad_text"], atol=1e-10, rtol=0)
    assert float(outputs["averaged_fraction"]) == pytest.approx(float(golden["averaged_fraction"]))


def test_golden_files_are_there():
    assert len(GOLDEN) == 3


@pytest.mark.parametrize("negatives", ["hardest", "selective"])
def test_a_switch_turns_the_rule_on_and_off(negatives):
    _, pairs = make_pairs(12)
    loss = TripletLoss(0.2, negatives, epsilon=0.5)
    on, off = torch.ones(12, dtype=torch.bool), torch.zeros(12, dtype=torch.bool)
    selective, hardest = TripletLoss(0.2, "selective", epsilon=0.5)(pairs), TripletLoss(0.2, "hardest")(pairs)
    assert 0 < selective["averaged_fraction"] < 1
    torch.testing.assert_close(loss(pairs, selective=on)["loss"], selective["loss"])
    torch.testing.assert_close(loss(pairs, selective=off)["loss"], hardest["loss"])
    assert loss(pairs, selective=off)["averaged_fraction"] == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TripletLoss(negatives="hard"), "one of 'hardest', 'selective', 'mean', got 'hard'"),
        (lambda: TripletLoss(margin=-0.2), "`margin` to be positive, got -0.2"),
        (lambda: TripletLoss(epsilon=0), "`epsilon` to be positive, got 0"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
