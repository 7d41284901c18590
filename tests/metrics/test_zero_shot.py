import math

import open_clip
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_itm import DualEncoder, OpenCLIPDualEncoder, zero_shot_accuracy
from tests.helpers.open_clip_models import CONFIGS, register
from tests.helpers.pictures import cut_outs
from tests.helpers.tiny import Tiny, tokenize

NAMES = ["dog", "orange cat", "a very long name of a thing", "sea"]
NUM_IMAGES = 23  # not a multiple of the batch sizes
TEMPLATES = ("a photo of a {}.", "{}", "the {} in a drawing")


@pytest.fixture
def model(tmp_path):
    register({"tiny-rn": CONFIGS["tiny-rn"]}, tmp_path)
    return OpenCLIPDualEncoder("tiny-rn")


def data_for(model, number=NUM_IMAGES, labels=None):
    transform = model.transforms["eval_transform"]
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (number,), generator=generator).tolist() if labels is None else labels
    return [(transform(image), label) for image, label in zip(cut_outs(number, 40), labels, strict=True)]


def by_hand(model, data, names, templates):
    """With loops: one text and one image at a time."""
    model.eval()
    prototypes = []
    for name in names:
        texts = [t.format(name) if isinstance(t, str) else t(name) for t in templates]
        vectors = [model.encode_text(model.transforms["tokenizer"]([text]))[0].tolist() for text in texts]
        units = [[x / math.hypot(*vector) for x in vector] for vector in vectors]
        total = [sum(column) for column in zip(*units, strict=True)]
        prototypes.append([x / math.hypot(*total) for x in total])
    hits = {}
    for image, label in data:
        vector = model.encode_image(image[None])[0].tolist()
        scores = [sum(a * b for a, b in zip(vector, prototype, strict=True)) for prototype in prototypes]
        hits.setdefault(label, []).append(scores.index(max(scores)) == label)
    every = [hit for of_class in hits.values() for hit in of_class]
    mean = sum(sum(of_class) / len(of_class) for of_class in hits.values()) / len(hits)
    return {"top1": 100 * sum(every) / len(every), "mean_per_class": 100 * mean}


@pytest.mark.parametrize("templates", [TEMPLATES, TEMPLATES[:1], open_clip.SIMPLE_IMAGENET_TEMPLATES])
@pytest.mark.parametrize("batch_size", [1, 4, NUM_IMAGES])
def test_agrees_with_loops(model, templates, batch_size):
    data = data_for(model)
    with torch.no_grad():
        expected = by_hand(model, data, NAMES, templates)
    measured = zero_shot_accuracy(model, DataLoader(data, batch_size), NAMES, templates=templates)
    assert measured == pytest.approx(expected)
    assert 0 < measured["top1"] < 100


def test_takes_any_module(model):
    data, options = DataLoader(data_for(model), 8), {"tokenizer": model.transforms["tokenizer"]}
    assert not hasattr(model.model, "device")
    assert zero_shot_accuracy(model.model, data, NAMES, **options) == zero_shot_accuracy(model, data, NAMES, **options)


def test_classes_without_images_do_not_count(model):
    data = data_for(model, labels=[0] * 20 + [2] * (NUM_IMAGES - 20))
    with torch.no_grad():
        expected = by_hand(model, data, NAMES, TEMPLATES)
    assert zero_shot_accuracy(model, DataLoader(data, 8), NAMES, templates=TEMPLATES) == pytest.approx(expected)


class Known(DualEncoder):
    """Images and names of one code."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.9)

    def encode_image(self, image):
        return self.dropout(image)

    def encode_text(self, text):
        return self.dropout(nn.functional.one_hot(text, 4).float())


def test_golden():
    """Three of four images are right; of class 0 one of two, of class 1 all."""
    images, labels = torch.eye(4)[[0, 1, 1, 1]], torch.tensor([0, 0, 1, 1])
    batches = [(images[:3], labels[:3], "a path"), (images[3:], labels[3:])]
    measured = zero_shot_accuracy(
        Known(),
        batches,
        ["0", "1", "2"],
        templates=["{}"],
        tokenizer=lambda texts: torch.tensor([int(t) for t in texts]),
    )
    assert measured == {"top1": 75.0, "mean_per_class": 75.0}
    measured = zero_shot_accuracy(
        Known(), [(images, torch.tensor([0, 1, 1, 0]))], ["0", "1"], templates=["{}"],
        tokenizer=lambda texts: torch.tensor([int(t) for t in texts]),
    )  # fmt: skip
    assert measured == {"top1": 75.0, "mean_per_class": 75.0}


def test_leaves_everything_as_it_was(model):
    model.train()
    model.model.visual.eval()  # a tower that somebody froze
    modes = {name: part.training for name, part in model.named_modules()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    loader = DataLoader(data_for(model), 8, shuffle=True)
    zero_shot_accuracy(model, loader, NAMES)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == {name: part.training for name, part in model.named_modules()}
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items()), "batch statistics too"

    with pytest.raises(ValueError, match=r"labels from 0 to 3, .* got 0 to 4"):
        zero_shot_accuracy(model, [(torch.zeros(2, 3, 32, 32), torch.tensor([0, 4]))], NAMES)
    with pytest.raises(RuntimeError):
        zero_shot_accuracy(model, [(torch.zeros(2, 5), torch.tensor([0, 1]))], NAMES)
    assert modes == {name: part.training for name, part in model.named_modules()}


def test_errors(model):
    with pytest.raises(ValueError, match="at least one batch"):
        zero_shot_accuracy(model, [], NAMES)
    with pytest.raises(ValueError, match="got 0 of the first and 1 of the second"):
        zero_shot_accuracy(model, [], [])
    with pytest.raises(ValueError, match="Expected `tokenizer`, because Tiny has no"):
        zero_shot_accuracy(Tiny(), [], NAMES)


def test_near_names_do_not_tie_under_autocast():
    class Angles(DualEncoder):
        def encode_image(self, image):
            return torch.stack([image.cos(), image.sin()], dim=1)

        encode_text = encode_image

    batches = [(torch.tensor([0.02, 0.04]), torch.tensor([1, 2]))]  # cosines of 0.9998 and 1: one number in bfloat16
    names = ["0.00", "0.02", "0.04"]
    with torch.autocast("cpu", torch.bfloat16):
        measured = zero_shot_accuracy(
            Angles(), batches, names, templates=["{}"], tokenizer=lambda texts: torch.tensor([float(t) for t in texts])
        )
    assert measured["top1"] == 100


def test_another_module_with_its_own_tokenizer():
    batches = [(torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 3]))]
    assert 0 <= zero_shot_accuracy(Tiny(), batches, NAMES, tokenizer=tokenize)["top1"] <= 100
