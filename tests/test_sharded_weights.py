"""Modules that FSDP2 splits in a loop of one's own, without a Trainer."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_itm import mine
from lightning_itm.encoder_output import returning_vectors
from lightning_itm.gradient_monitor import measure_gradient
from lightning_itm.sharded_weights import is_part, sharded_modules
from tests.helpers.sharded import fully_shard, in_two_processes, needs_fsdp2
from tests.helpers.tiny import tiny_pairs

TABLE = {"texts_per_image": 3, "images_per_text": 3, "batch_size": 2}
pytestmark = [pytest.mark.forks, needs_fsdp2]


class Encoders(nn.Module):
    """Two towers, and a projection that the module itself holds, which its `forward` alone would gather."""

    def __init__(self):
        super().__init__()
        self.image_encoder = nn.Sequential(nn.Flatten(), nn.Linear(768, 7))
        self.text_encoder = nn.EmbeddingBag(256, 7)
        self.projection = nn.Parameter(torch.randn(7, 7))

    def encode_image(self, image):
        return self.image_encoder(image) @ self.projection

    def encode_text(self, text):
        return self.text_encoder(text)

    def split(self):
        mesh = init_device_mesh("cpu", (2,))
        for part in (self.image_encoder, self.text_encoder, self):
            fully_shard(part, mesh=mesh)
        return self


def connect(rank):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)


def _mine(rank):
    connect(rank)
    model = Encoders()
    for num_images in (23, 5):  # the ten texts of five images are one tile, so that the other rank has none
        for options in ({}, {"split_embeddings": True}):
            torch.manual_seed(0)
            whole, parts = Encoders(), Encoders()
            parts.load_state_dict(whole.state_dict())
            pairs = tiny_pairs(num_images)
            expected, got = (mine(one, pairs, **TABLE, **options) for one in (whole, parts.split()))
            assert torch.equal(got.texts, expected.texts)
            assert torch.equal(got.images, expected.images)
            assert torch.equal(got.text_scores, expected.text_scores)
            assert all(is_part(parameter) for parameter in parts.parameters())
            assert "encode_image" not in vars(parts)
    assert len(sharded_modules(model)) == 0


def test_is_mined_in_a_loop_of_ones_own():
    in_two_processes(_mine)


def _measure(rank):
    connect(rank)
    whole, parts = Encoders().double(), Encoders().double()
    parts.load_state_dict(whole.state_dict())
    parts.split()
    torch.distributed.fsdp.register_fsdp_forward_method(parts, "encode_image")
    images = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    whole.encode_image(images).square().mean().mul(1e-25).backward()  # both halves, whose squares float32 would lose
    parts.encode_image(images[2 * rank :][:2]).square().mean().mul(1e-25).backward()
    for of in (lambda one: one.parameters(), lambda one: [one.image_encoder[1].bias], lambda one: [one.projection]):
        torch.testing.assert_close(measure_gradient([*of(parts)]), measure_gradient([*of(whole)]), rtol=1e-6, atol=0)
    assert measure_gradient([*parts.text_encoder.parameters()]).tolist() == [-1, -1]


def test_gradients_are_measured_whole():
    in_two_processes(_measure)


def _encode_wrongly(rank):
    connect(rank)
    model = Encoders().split()
    encode = returning_vectors(lambda image: model.image_encoder[1](image.flatten(1)), "image")
    with pytest.raises(RuntimeError, match=r"weights that FSDP2 has split: .*register_fsdp_forward_method"):
        encode(torch.rand(2, 3, 16, 16))
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2"):
        returning_vectors(model.encode_image, "image")(torch.rand(2, 3, 3, 3))


def test_a_call_that_gathers_nothing_is_explained():
    in_two_processes(_encode_wrongly)
