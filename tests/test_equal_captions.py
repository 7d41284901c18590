"""A model that knows every caption pays nothing, though each caption is on three images."""

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from lightning_itm import (
    DualEncoder,
    FalseNegativeElimination,
    FalseNegativeSampler,
    ImageTextDataModule,
    ImageTextDataset,
    ImageTextRetrieval,
    InfoNCELoss,
    SigmoidLoss,
    TripletLoss,
)
from tests.helpers.fit import fit

NUM_CAPTIONS, REPEATS = 8, 3
LOSSES = {
    "hardest": lambda: TripletLoss(0.2),
    "mean": lambda: TripletLoss(0.2, "mean"),
    "info_nce": InfoNCELoss,
    "sigmoid": SigmoidLoss,
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:24 of 24 pairs share their caption"),
    pytest.mark.filterwarnings("ignore:.*`val_dataloader`"),
]


class Known(DualEncoder):
    """Embed both sides of a pair as the vector of its caption."""

    def __init__(self, loss=None, **metric):
        super().__init__(loss, learning_rate=0.0, warmup_steps=0)
        self.metric = metric
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.register_buffer("vectors", normalize(torch.eye(NUM_CAPTIONS) - 0.1, dim=1))

    def encode_image(self, image):
        return self.vectors[image] * self.weight

    def encode_text(self, text):
        return self.vectors[text] * self.weight

    def configure_retrieval(self, stage):
        return ImageTextRetrieval(**self.metric)


def number_of(image):
    return torch.tensor(image.getpixel((0, 0))[0])


def tokenize(texts):
    return torch.tensor([int(text.split()[-1]) for text in texts])


def make_pairs(repeats=REPEATS, **options):
    """Pictures that show the number of their caption. The same words are in capitals, or spaced, on some of them."""
    numbers = [number for number in range(NUM_CAPTIONS) for _ in range(repeats)]
    forms = ("a mug of kind {}", "A  mug of kind {}", "a mug of\tKIND {}")
    texts = [forms[row % repeats].format(number) for row, number in enumerate(numbers)]
    images = [Image.new("RGB", (4, 4), (number, 0, 0)) for number in numbers]
    return ImageTextDataset(images, texts, transform=number_of, tokenizer=tokenize, **options)


def loss_of(name, pairs):
    """The loss of the whole set in one batch."""
    data = ImageTextDataModule(pairs, batch_size=len(pairs), num_workers=0)
    return fit(Known(LOSSES[name]()), data, max_epochs=1, limit_val_batches=0).metrics["train/loss"]


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_that_of_the_set_without_repeats(name):
    once, excluded, kept = (
        loss_of(name, pairs) for pairs in (make_pairs(1), make_pairs(), make_pairs(equal_captions="keep"))
    )
    assert kept > excluded
    if name in ("hardest", "mean"):  # in the others all negatives count, and there are three times as many
        assert once == excluded == 0


@pytest.mark.parametrize("option", ["exclude", "keep"])
def test_the_memory_bank_has_no_equal_caption(option):
    """A queue that holds the whole set: the hardest candidate costs the margin, or nothing."""
    data = ImageTextDataModule(make_pairs(equal_captions=option), batch_size=6, num_workers=0)
    sampler = FalseNegativeSampler(posterior="published", prior=1e-9, cut_down="off")
    bank = FalseNegativeElimination(24, start_epoch=0, sampler=sampler)
    metrics = fit(Known(InfoNCELoss(init_logit_scale=4.0)), data, bank, max_epochs=2, limit_val_batches=0).metrics
    assert torch.equal(bank.bank.valid, torch.ones(24, dtype=torch.bool))
    assert (metrics["train/memory_cost"] > 0.5) == (option == "keep")


@pytest.mark.parametrize(("option", "recall"), [("right", 100), ("wrong", 0)])
def test_recall(option, recall):
    pairs = make_pairs()
    data = ImageTextDataModule(pairs, pairs, batch_size=5, num_workers=0)
    metrics = fit(Known(equal_captions=option), data, max_epochs=1).metrics
    assert (metrics["val/i2t_r1"], metrics["val/t2i_r1"]) == (recall, recall)
