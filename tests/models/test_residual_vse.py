from pathlib import Path

import lightning as L
import numpy as np
import open_clip
import pytest
import torch
from torch.nn.functional import normalize

from lightning_itm import (
    DualEncoder,
    GradientNormMonitor,
    ImageTextDataModule,
    OfflineHardNegativeMining,
    QuintupletLoss,
    RegionFeatureDataset,
    ResidualVSE,
    TripletLoss,
)
from lightning_itm.data import PaddedSequence
from lightning_itm.models import RegionEncoder
from tests.helpers.tiny import SILENT

GOLDEN = Path(__file__).parents[1] / "golden" / "rvse_0.npz"


def golden():
    return {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(GOLDEN).items()}


def published_weights():
    return {name: value for name, value in golden().items() if "_encoder." in name}


def test_embeddings_equal_the_published_code():
    arrays, model = golden(), ResidualVSE.from_published(published_weights()).eval()
    ids = torch.arange(5)
    with torch.no_grad():
        pairs = model.embed(
            {
                "image": PaddedSequence(arrays["image_features"], arrays["image_lengths"]),
                "text": PaddedSequence(arrays["tokens"], arrays["token_lengths"]),
                "image_id": ids,
                "text_id": ids,
            }
        )
    torch.testing.assert_close(pairs.image_embeddings, normalize(arrays["image_embedding"], dim=1), atol=1e-9, rtol=0)
    torch.testing.assert_close(pairs.text_embeddings, normalize(arrays["text_embedding"], dim=1), atol=1e-9, rtol=0)


def make_pairs(num_images=40, captions=2, dim=6, seed=0, **kwargs):
    """Regions of what a caption names, and noise."""
    generator = np.random.default_rng(seed)
    words = generator.standard_normal((12, dim))
    names = [[f"w{word}" for word in generator.choice(12, 3, replace=False)] for _ in range(num_images)]
    features = np.stack(
        [np.stack([words[int(name[1:])] for name in row] + [generator.standard_normal(dim)]) for row in names]
    )
    texts = [[" ".join(generator.permutation(row)) for _ in range(captions)] for row in names]
    return RegionFeatureDataset(features.astype(np.float16), texts, **kwargs)


def fit(loss=None, callbacks=(), epochs=3, **kwargs):
    L.seed_everything(0, verbose=False)
    pairs = make_pairs(**kwargs)
    model = ResidualVSE(len(pairs.vocabulary), 6, 16, 8, loss, learning_rate=5e-3)
    data = ImageTextDataModule(pairs, pairs, batch_size=16, num_workers=0, seed=3)
    trainer = L.Trainer(callbacks=list(callbacks), max_epochs=epochs, **SILENT)
    trainer.fit(model, datamodule=data)
    return model, trainer


def test_learns():
    _, trainer = fit(epochs=15)
    assert trainer.callback_metrics["val/rsum"] > 240  # of 600; chance is about 90 with 40 images


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("inject", ["samples", "embeddings"])
def test_with_the_callbacks(inject, precision):
    callbacks = [OfflineHardNegativeMining(texts_per_image=8, images_per_text=4, inject=inject), GradientNormMonitor()]
    model, trainer = fit(QuintupletLoss(), callbacks)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert "mining/gap" in trainer.callback_metrics
    assert callbacks[0].plot(3, num_negatives=2).axes


def test_loads_its_checkpoint(tmp_path):
    model, trainer = fit()
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = ResidualVSE.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_as_a_head_over_patch_tokens():
    """Of an open_clip image tower, with the text tower beside it."""

    class Head(DualEncoder):
        def __init__(self):
            super().__init__(TripletLoss(), warmup_steps=0)
            config = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
            text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1, "output_tokens": True}
            self.model = open_clip.CustomTextCLIP(16, config, text)
            self.model.visual.output_tokens = True
            self.image_head, self.text_head = RegionEncoder(64, 16), RegionEncoder(32, 16)

        def pool(self, head, tokens):
            return head(PaddedSequence(tokens, torch.full((len(tokens),), tokens.shape[1], device=tokens.device)))

        def encode_image(self, image):
            return self.pool(self.image_head, self.model.visual(image)[1])

        def encode_text(self, text):
            return self.pool(self.text_head, self.model.text(text)[1])

    ids = torch.arange(4)
    batch = {"image": torch.randn(4, 3, 32, 32), "text": torch.randint(1, 50, (4, 8)), "image_id": ids, "text_id": ids}
    model = Head()
    loss = model.training_step(batch, 0)
    loss.backward()
    assert model.image_head.fc.weight.grad.abs().max() > 0
    assert model.text_head.fc.weight.grad.abs().max() > 0


class TestBadInput:
    def test_lengths_of_zero(self):
        with pytest.raises(ValueError, match=r"lengths from 1 to 3, the padded one, got 0 to 2. Leave empty sets"):
            PaddedSequence(torch.zeros(2, 3, 4), torch.tensor([2, 0]))

    def test_lengths_that_do_not_match(self):
        with pytest.raises(ValueError, match=r"one length for each of the 2 sequences, got the shape \(3,\)"):
            PaddedSequence(torch.zeros(2, 3, 4), torch.tensor([1, 1, 1]))

    def test_weights_of_something_else(self):
        weights = published_weights()
        with pytest.raises(ValueError, match=r"Expected the published names, \['image_encoder.fc.weight'"):
            ResidualVSE.from_published({"a": torch.zeros(1)})
        with pytest.raises(ValueError, match=r"got \['image_encoder.extra'\] that it has not, and without \[\]"):
            ResidualVSE.from_published({**weights, "image_encoder.extra": torch.zeros(1)})
        del weights["image_encoder.fc.bias"]
        with pytest.raises(ValueError, match=r"got \[\] that it has not, and without \['image_encoder.fc.bias'\]"):
            ResidualVSE.from_published(weights)
