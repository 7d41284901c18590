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
    OfflineHardNegativeMining,
    QuintupletLoss,
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


def several_pairs(option):
    """Ten images of two captions each, of which images 2k and 2k + 1 share one, and images 2k + 1 and 2k + 2 another."""
    texts = [[f"caption {i // 2}", f"CAPTION {5 + (i + 1) // 2}"] for i in range(10)]
    images = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(10)]
    return ImageTextDataset(images, texts, transform=number_of, tokenizer=tokenize, equal_captions=option)


class Noise(DualEncoder):
    def __init__(self, loss=None):
        super().__init__(loss, learning_rate=0.0, warmup_steps=0)
        self.image_encoder, self.text_encoder = torch.nn.Embedding(10, 6), torch.nn.Embedding(11, 6)

    def encode_image(self, image):
        return self.image_encoder(image)

    def encode_text(self, text):
        return self.text_encoder(text)


@pytest.mark.filterwarnings("ignore:18 of 20 pairs share their caption")
@pytest.mark.parametrize("option", ["exclude", "keep"])
@pytest.mark.parametrize(
    "way", [{"encode": "pass"}, {"encode": "training"}, {"inject": "embeddings"}, {"inject": "batches"}]
)
def test_mining_compares_with_all_captions_of_an_image(option, way):
    pairs = several_pairs(option)
    folded, owner = [text.lower() for text in pairs.texts], pairs.text_image_id.tolist()
    captions_of = [{folded[t] for t in range(20) if owner[t] == image} for image in range(10)]
    mining = OfflineHardNegativeMining(
        texts_per_image=20, images_per_text=10, group_size=1, relative_margin=None, **way
    )
    loss = TripletLoss() if way.get("inject") == "batches" else QuintupletLoss()
    data = ImageTextDataModule(pairs, batch_size=5, num_workers=0)
    fit(Noise(loss), data, mining, seed=0, max_epochs=2, limit_val_batches=0)
    for image, row in enumerate(mining.table.texts.tolist()):
        other = [t for t in range(20) if owner[t] != image]
        negatives = [t for t in other if folded[t] not in captions_of[image]]
        assert sorted(row[: row.index(-1)]) == (negatives if option == "exclude" else other)
        assert len(negatives) < len(other)
    for text, row in enumerate(mining.table.images.tolist()):
        other = [i for i in range(10) if i != owner[text]]
        negatives = [i for i in other if folded[text] not in captions_of[i]]
        assert sorted(row[: row.index(-1)]) == (negatives if option == "exclude" else other)


@pytest.mark.parametrize("inject", ["samples", "embeddings"])
def test_mined_negatives_cost_a_perfect_model_nothing(inject):
    data = ImageTextDataModule(make_pairs(), batch_size=6, num_workers=0)
    mining = OfflineHardNegativeMining(texts_per_image=4, images_per_text=4, inject=inject)
    metrics = fit(Known(QuintupletLoss()), data, mining, max_epochs=1, limit_val_batches=0).metrics
    assert metrics["train/loss"] == 0
    assert metrics["mining/gap"] > 1
    assert metrics["train/hard_margin"] > 1


@pytest.mark.parametrize(("option", "recall"), [("right", 100), ("wrong", 0)])
def test_recall(option, recall):
    pairs = make_pairs()
    data = ImageTextDataModule(pairs, pairs, batch_size=5, num_workers=0)
    metrics = fit(Known(equal_captions=option), data, max_epochs=1).metrics
    assert (metrics["val/i2t_r1"], metrics["val/t2i_r1"]) == (recall, recall)
