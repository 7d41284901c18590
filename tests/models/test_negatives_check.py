import warnings

import pytest
import torch

from lightning_itm import (
    FalseNegativeElimination,
    ImageTextDataModule,
    ImageTextDataset,
    InfoNCELoss,
    OfflineHardNegativeMining,
    TripletLoss,
)
from tests.helpers.fit import fit
from tests.helpers.pictures import cut_outs
from tests.helpers.tiny import AUGMENTED, PLAIN, Tiny, tiny_data, tokenize

WARNING = r"The first batch has 1 pairs, all of one image, so .*`accumulate_grad_batches` does not help"


class NoNorm(Tiny):
    """Without batch statistics, which take no batch of one."""

    def __init__(self, loss=None):
        super().__init__(loss, warmup_steps=0, weight_decay=0.0)
        self.image_encoder[2] = torch.nn.Identity()


@pytest.mark.parametrize("loss", [InfoNCELoss, TripletLoss])
def test_a_batch_of_one_pair_is_told_once(loss):
    with pytest.warns(UserWarning, match=WARNING) as caught:
        fit(NoNorm(loss()), tiny_data(batch_size=1), accumulate_grad_batches=4)
    assert len([one for one in caught if "no negatives" in str(one.message)]) == 1


def test_a_batch_of_one_image_is_told():
    """As one that has all captions of an image side by side."""
    texts = [[f"a {i}", f"b {i}", f"c {i}", f"d {i}"] for i in range(4)]
    pairs = ImageTextDataset(cut_outs(4), texts, transform=PLAIN, tokenizer=tokenize)
    loader = torch.utils.data.DataLoader(pairs, batch_size=4)
    with pytest.warns(UserWarning, match="The first batch has 4 pairs"):
        fit(NoNorm(), loader, max_epochs=1)


@pytest.mark.parametrize(
    "callback",
    [
        lambda: FalseNegativeElimination(8, start_epoch=0),
        lambda: OfflineHardNegativeMining(texts_per_image=4, images_per_text=2),
        lambda: OfflineHardNegativeMining(texts_per_image=4, images_per_text=2, inject="embeddings"),
    ],
)
def test_what_brings_negatives_is_enough(callback):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*no negatives")
        fit(NoNorm(), tiny_data(batch_size=1), callback(), max_epochs=1)


def test_several_images_are_enough():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*no negatives")
        pairs = ImageTextDataset(
            cut_outs(3), [[f"a {i}", f"b {i}"] for i in range(3)], transform=AUGMENTED, tokenizer=tokenize
        )
        fit(NoNorm(), ImageTextDataModule(pairs, batch_size=3, num_workers=0), max_epochs=4)
