import random

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lightning_itm import (
    DualEncoder,
    FalseNegativeElimination,
    FalseNegativeSampler,
    GradientNormMonitor,
    InfoNCELoss,
    OfflineHardNegativeMining,
    OpenCLIPDualEncoder,
    QuintupletLoss,
    ResidualVSE,
    SigmoidLoss,
    TripletLoss,
)
from lightning_itm.data import PaddedSequence
from lightning_itm.models.gradient_cache import encode_in_chunks
from lightning_itm.randomness import random_streams
from tests.helpers.open_clip_models import CONFIGS, data_for, register
from tests.helpers.tiny import SILENT, Tiny, tiny_data

LOSSES = {
    "hardest": lambda: TripletLoss(0.5, "hardest"),
    "mean": lambda: TripletLoss(0.5, "mean"),
    "selective": lambda: TripletLoss(0.5, "selective", epsilon=0.3),
    "quintuplet": lambda: QuintupletLoss(TripletLoss(0.5), offline_margin=0.3),
    "info_nce": InfoNCELoss,
    "sigmoid": SigmoidLoss,
}


class Towers(DualEncoder):
    """Two layers each, and nothing random; remembers how many rows came at once."""

    def __init__(self, loss=None, width=16, **kwargs):
        super().__init__(loss, **kwargs)
        self.image_encoder = nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, 5))
        self.text_encoder = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 5))
        self.rows = {"image": [], "text": []}

    def encode_image(self, image):
        self.rows["image"].append(len(image))
        return self.image_encoder(image)

    def encode_text(self, text):
        self.rows["text"].append(len(text))
        return self.text_encoder(text)


def noise(num_pairs, dtype=torch.float64, mined=True):
    """Pairs of which some share an image, with mined negatives."""
    generator = torch.Generator().manual_seed(num_pairs)

    def draw(width):
        return torch.randn(num_pairs, width, generator=generator, dtype=dtype)

    place = torch.arange(num_pairs)
    batch = {"image": draw(8), "text": draw(6), "image_id": place // 2, "text_id": place}
    if mined:
        hard = {"text": draw(6), "image_of_text": draw(8), "image_id_of_text": 100 + place}
        batch["hard"] = hard | {"image": draw(8), "text_of_image": draw(6), "image_id": 200 + place}
    return batch


def gradients(model, batch, chunk_size):
    model.zero_grad()
    model.chunk_size = chunk_size
    model.training_step(batch, 0).backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def check_close(got, expected, tolerance):
    """Compare tensor by tensor, relative to its largest entry: what a sum in another order may differ by."""
    assert got.keys() == expected.keys()
    assert any(gradient.abs().max() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        assert (got[name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name


class TestGradient:
    @given(num_pairs=st.integers(2, 17), chunk_size=st.integers(1, 20))
    @settings(max_examples=12)
    @pytest.mark.parametrize("name", LOSSES)
    def test_is_that_of_the_whole_batch(self, name, num_pairs, chunk_size):
        torch.manual_seed(num_pairs)
        model, batch = Towers(LOSSES[name]()).double(), noise(num_pairs)
        expected = gradients(model, batch, None)
        if num_pairs > 2:  # two pairs of one image have no negatives but the mined ones
            check_close(gradients(model, batch, chunk_size), expected, 1e-10)

    @pytest.mark.parametrize("chunk_size", [5, 16])
    @pytest.mark.parametrize("name", LOSSES)
    def test_in_float32(self, name, chunk_size):
        model, batch = Towers(LOSSES[name]()), noise(48, torch.float32)
        check_close(gradients(model, batch, chunk_size), gradients(model, batch, None), 1e-5)

    @pytest.mark.parametrize("name", LOSSES)
    def test_under_autocast(self, name):
        """Each chunk's share of a gradient is rounded to eight bits: together no worse than twice the whole, rounded once."""
        model, batch = Towers(LOSSES[name]()), noise(48, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            chunked, plain = gradients(model, batch, 9), gradients(model, batch, None)
        exact = gradients(model, batch, None)
        errors = [
            sum(float((got[one] - exact[one]).square().sum()) for one in exact) ** 0.5 for got in (chunked, plain)
        ]
        assert 0 < errors[0] < 2 * errors[1]

    def test_with_whatever_is_drawn(self):
        """Dropout, NumPy's and Python's noise: as in chunks that are all kept, also for what is drawn after the step."""

        class Noisy(Towers):
            def encode_image(self, image):
                image = nn.functional.dropout(image, 0.3)
                return super().encode_image(image) + torch.rand(5) * random.random() * np.random.rand()

            def encode_text(self, text):
                return nn.functional.dropout(super().encode_text(text), 0.3)

        class ByHand(Noisy):
            def encode_image(self, image):
                return torch.cat([Noisy.encode_image(self, chunk) for chunk in image.split(3)])

            def encode_text(self, text):
                return torch.cat([Noisy.encode_text(self, chunk) for chunk in text.split(3)])

        results = []
        for model, chunk_size in ((ByHand(), None), (Noisy(), 3)):
            model.load_state_dict(Towers().state_dict() if not results else results[0][0])
            L.seed_everything(7, verbose=False)
            got = gradients(model, noise(12, torch.float32), chunk_size)
            results.append((model.state_dict(), got, random_streams()))
        check_close(results[1][1], results[0][1], 1e-6)
        assert str(results[1][2]) == str(results[0][2])

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    def test_with_dropout_of_rows_that_are_no_tensors(self, device):
        """Of weights that are all one, each gradient is the sum of what dropout has let through."""
        weight = torch.ones(50, device=device, requires_grad=True)
        total = encode_in_chunks(lambda rows: nn.functional.dropout(weight.expand(len(rows), 50)), ["a"] * 7, 3).sum(0)
        total.sum().backward()
        assert torch.equal(weight.grad, total)
        assert total.std() > 0

    def test_with_batch_statistics_is_that_of_the_chunks(self):
        model, batch = Towers(), noise(12, torch.float32)
        model.image_encoder.append(nn.BatchNorm1d(5))
        model.image_encoder[2].bias.requires_grad_(
            False
        )  # which the norm takes out again: its gradient is rounding alone
        got = gradients(model, batch, 3)
        model.zero_grad()
        model.chunk_size = None
        encode = model.encode_image
        model.encode_image = lambda image: torch.cat([encode(chunk) for chunk in image.split(3)])
        model.training_step(batch, 0).backward()
        check_close(got, {name: one.grad for name, one in model.named_parameters() if one.grad is not None}, 1e-5)

    def test_of_compiled_towers(self):
        model, batch = Towers(), noise(10, torch.float32)
        expected = gradients(model, batch, None)
        model.image_encoder.compile(backend="aot_eager")
        check_close(gradients(model, batch, 5), expected, 1e-5)

    @pytest.mark.parametrize("name", ["tiny-vit", "tiny-coca"])
    @pytest.mark.parametrize(
        "options", [{}, {"gradient_checkpointing": True}, {"lock_image": True}, {"lock_text": True}], ids=str
    )
    @pytest.mark.usefixtures("_registered")
    def test_of_open_clip(self, name, options):
        model = OpenCLIPDualEncoder(name, chunk_size=3, **options)
        assert model.hparams["chunk_size"] == 3
        batch = next(iter(data_for(model).val_dataloader()))
        check_close(gradients(model, batch, 3), gradients(model, batch, None), 1e-4)

    def test_of_padded_sequences(self):
        model = ResidualVSE(20, 8, 16, 6, loss=TripletLoss(0.5), chunk_size=2).double().eval()
        assert model.hparams["chunk_size"] == 2
        lengths = torch.tensor([3, 1, 4, 2, 4])
        image = PaddedSequence(torch.randn(5, 4, 8, dtype=torch.float64), lengths)
        text = PaddedSequence(torch.randint(20, (5, 4)), lengths.flip(0))
        batch = {"image": image, "text": text, "image_id": torch.arange(5), "text_id": torch.arange(5)}
        check_close(gradients(model, batch, 2), gradients(model, batch, None), 1e-10)


class TestChunks:
    def test_are_encoded_twice_where_there_is_a_gradient(self):
        model = Towers()
        gradients(model, noise(10, torch.float32, mined=False), 4)
        assert model.rows == {"image": [3, 3, 4, 4, 3, 3], "text": [3, 3, 4, 4, 3, 3]}

    def test_are_encoded_once_where_there_is_none(self):
        model = Towers(chunk_size=4)
        model.image_encoder.requires_grad_(False)
        gradients(model, noise(8, torch.float32, mined=False), 4)
        assert model.rows == {"image": [4, 4], "text": [4, 4, 4, 4]}
        with torch.no_grad():
            model.embed(noise(8, torch.float32))
        assert model.rows["text"] == [4, 4, 4, 4, 4, 4]

    def test_exist_one_at_a_time(self):
        """Sixteen chunks take hardly more than two: activations of one, beside weights' gradients and a small loss."""
        model = Towers(width=8192)
        whole, sixteen, two = (
            peak_bytes(model, noise(rows, torch.float32, mined=False), size)
            for rows, size in ((128, None), (128, 8), (16, 8))
        )
        assert sixteen < whole / 5
        assert sixteen < 1.3 * two

    @pytest.mark.parametrize(
        "inputs",
        [
            torch.arange(14).view(7, 2),
            list(range(7)),
            PaddedSequence(torch.ones(7, 2), torch.tensor([1, 2, 1, 2, 1, 2, 2])),
            {"tokens": torch.arange(7), "mask": torch.ones(7, 2), "words": list("abcdefg")},
            torch.ones(0, 2),
        ],
        ids=lambda inputs: type(inputs).__name__,
    )
    def test_of_every_kind_of_rows(self, inputs):
        seen = []

        def encode(chunk):
            seen.append(chunk)
            parts = chunk.values() if isinstance(chunk, dict) else [chunk]
            assert len({len(part) for part in parts}) == 1
            return torch.ones(len(next(iter(parts))), 3)

        rows = len(inputs["tokens"]) if isinstance(inputs, dict) else len(inputs)
        assert encode_in_chunks(encode, inputs, 3).shape == (rows, 3)
        assert {type(chunk) for chunk in seen} == {type(inputs)}
        assert len(seen) == (3 if rows else 1)


def peak_bytes(model, batch, chunk_size):
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorder:
        gradients(model, batch, chunk_size)
    events = [event for event in recorder.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


class Plain(Tiny):
    """Without dropout, batch statistics and noise."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.image_encoder = nn.Sequential(nn.Flatten(), nn.Linear(768, 16))

    def encode_image(self, image):
        return self.image_encoder(image)


def fit(model, inject, **options):
    callbacks = [
        OfflineHardNegativeMining(texts_per_image=12, images_per_text=8, inject=inject),
        FalseNegativeElimination(queue_size=16, start_epoch=0, sampler=FalseNegativeSampler(min_count=4)),
        GradientNormMonitor(),
    ]
    trainer = L.Trainer(callbacks=callbacks, **{**SILENT, "max_epochs": 2, **options})
    L.seed_everything(3, verbose=False)
    trainer.fit(model, datamodule=tiny_data(batch_size=8))
    return model, trainer


class TestFit:
    @pytest.mark.parametrize("inject", ["samples", "embeddings"])
    def test_ends_where_the_whole_batch_does(self, inject):
        """Twelve steps of AdamW, in float64: rounding alone would be 1e-13; AdamW divides it by small gradients."""
        results = []
        for chunk_size in (None, 3):
            torch.manual_seed(0)
            model, _ = fit(Plain(QuintupletLoss(), chunk_size=chunk_size), inject, precision="64-true")
            results.append(model.state_dict())
        assert not torch.equal(results[0]["text_encoder.weight"], Plain().double().text_encoder.weight)
        for name, expected in results[0].items():
            torch.testing.assert_close(results[1][name], expected, atol=1e-9, rtol=0)

    @pytest.mark.parametrize("inject", ["samples", "embeddings"])
    def test_under_autocast(self, inject):
        model, trainer = fit(Plain(QuintupletLoss(), chunk_size=3), inject, precision="bf16-mixed")
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert {"gradient/level", "memory/valid_share", "mining/gap"} & trainer.callback_metrics.keys()

    def test_checkpoints_know_the_size(self, tmp_path):
        _, trainer = fit(Plain(QuintupletLoss(), chunk_size=3), "embeddings", max_epochs=1)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        model = Plain.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True, loss=QuintupletLoss())
        assert model.chunk_size == 3

    def test_warns_of_batch_statistics(self):
        with pytest.warns(
            UserWarning, match=r"`chunk_size=3` with BatchNorm in training mode, 1 of them, such as `image_e"
        ):
            L.Trainer(**SILENT, max_epochs=1).fit(Tiny(chunk_size=3), datamodule=tiny_data())

    @pytest.mark.filterwarnings(r"ignore:Found 1 module\(s\) in eval mode")  # Lightning's own word
    def test_does_not_warn_of_frozen_ones(self):
        model = Tiny(chunk_size=3)
        model.image_encoder[2].eval()
        before = model.image_encoder[2].running_mean.clone()
        L.Trainer(**SILENT, max_epochs=1).fit(model, datamodule=tiny_data())  # a warning would be an error
        assert torch.equal(model.image_encoder[2].running_mean, before)

    @pytest.mark.usefixtures("_registered")
    @pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode")  # the locked norms
    def test_of_a_resnet_whose_statistics_are_locked(self):
        model = OpenCLIPDualEncoder("tiny-rn", lock_image=True, chunk_size=3, learning_rate=1e-3)
        before = {name: value.clone() for name, value in model.model.visual.state_dict().items()}
        L.Trainer(**SILENT, max_epochs=1).fit(model, datamodule=data_for(model))
        assert all(torch.equal(value, before[name]) for name, value in model.model.visual.state_dict().items())


class TestBadInput:
    @pytest.mark.parametrize("size", [0, -1, 2.5, "64"])
    def test_size(self, size):
        with pytest.raises(ValueError, match=f"`chunk_size` to be a positive integer, got {size!r}. It is the number"):
            Towers(chunk_size=size)

    @pytest.mark.parametrize("inputs", [(torch.ones(3),), {"a": torch.ones(3), "b": (1, 2, 3)}, "text", None, {}])
    def test_rows(self, inputs):
        wrong = inputs["b"] if isinstance(inputs, dict) and inputs else inputs
        with pytest.raises(
            TypeError, match=f"a PaddedSequence or a dict of these, got {type(wrong).__name__}. Collate"
        ):
            encode_in_chunks(lambda rows: rows, inputs, 2)

    def test_rows_that_differ_in_number(self):
        with pytest.raises(ValueError, match=r"as many rows in all of \['a', 'b'\], got {'a': 3, 'b': 2}. Leave"):
            encode_in_chunks(lambda rows: rows, {"a": torch.ones(3), "b": torch.ones(2, 3)}, 2)


@pytest.fixture(scope="module")
def _registered(tmp_path_factory):
    register(CONFIGS, tmp_path_factory.mktemp("configs"))
