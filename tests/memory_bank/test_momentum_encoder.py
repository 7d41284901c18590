import threading

import pytest
import torch
from torch import nn

from lightning_itm.memory_bank import MomentumEncoder
from tests.helpers.tiny import Tiny, tiny_data


class TestMomentumEncoder:
    def setup_method(self):
        torch.manual_seed(0)
        self.module = Tiny()
        self.batch = next(iter(tiny_data().train_dataloader()))

    def test_follows_slowly(self):
        encoder = MomentumEncoder(self.module, 0.9)
        before = {name: value.clone() for name, value in encoder.module.named_parameters()}
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.add_(torch.randn_like(parameter))
        encoder.update(self.module)
        for name, live in self.module.named_parameters():
            expected = 0.9 * before[name] + 0.1 * live
            torch.testing.assert_close(encoder.module.get_parameter(name), expected)

    def test_no_momentum_is_the_module_itself(self):
        encoder = MomentumEncoder(self.module, 0.0)
        with torch.no_grad():
            self.module.image_encoder[1].weight.mul_(2)
        encoder.update(self.module)
        for name, live in self.module.named_parameters():
            assert torch.equal(encoder.module.get_parameter(name), live)

    def test_leaves_the_module_as_it_was(self):
        """Train flags, batch statistics, random streams and gradients."""
        self.module.train()
        self.module.text_encoder.eval()
        encoder = MomentumEncoder(self.module)
        flags = [part.training for part in self.module.modules()]
        state = {name: value.clone() for name, value in self.module.state_dict().items()}
        random = torch.get_rng_state()
        pairs = encoder(self.batch)
        encoder.update(self.module)
        assert flags == [part.training for part in self.module.modules()]
        assert all(torch.equal(value, state[name]) for name, value in self.module.state_dict().items())
        assert torch.equal(random, torch.get_rng_state())
        assert not pairs.image_embeddings.requires_grad
        assert all(not parameter.requires_grad for parameter in encoder.parameters())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in self.module.parameters())

    def test_takes_over_batch_statistics(self):
        encoder = MomentumEncoder(self.module)
        self.module.train().embed(self.batch)
        assert not torch.equal(encoder.module.image_encoder[2].running_mean, self.module.image_encoder[2].running_mean)
        encoder.update(self.module)
        for name, buffer in self.module.named_buffers():
            assert torch.equal(encoder.module.get_buffer(name), buffer)

    def test_embeds_in_eval_mode(self):
        encoder = MomentumEncoder(self.module.train())
        torch.testing.assert_close(
            encoder(self.batch).image_embeddings, self.module.eval().embed(self.batch).image_embeddings
        )

    @pytest.mark.parametrize("momentum", [1.0, -0.1, 1.5, float("nan")])
    def test_momentum_out_of_range(self, momentum):
        with pytest.raises(ValueError, match=rf"Expected `momentum` to be in \[0, 1\), got {momentum}"):
            MomentumEncoder(self.module, momentum)

    def test_a_copy_that_runs_the_live_weights(self):
        """A compiled method, a closure, a hook: all are found by what they do."""

        def compiled(module):
            module.encode_image = torch.compile(module.encode_image, backend="eager")

        def closure(module):
            inner = module.text_encoder.forward
            module.text_encoder.forward = lambda text: inner(text)

        def hook(module):
            module.text_encoder.register_forward_hook(lambda *_: module.text_encoder.weight[:4])

        for spoil, kind in ((compiled, "image"), (closure, "text"), (hook, "text")):
            module = Tiny()
            spoil(module)
            with pytest.raises(TypeError, match=f"its {kind} embeddings come from those of the module itself"):
                MomentumEncoder(module)(self.batch)

    def test_other_attributes_are_no_matter(self):
        self.module.encode_batch_size = 64
        self.module.image_encoder.compile(backend="eager")
        assert len(MomentumEncoder(self.module)(self.batch)) == 4

    def test_buffers_that_are_made_late_or_change_their_shape(self):
        self.module.text_encoder.register_buffer("cache", None)
        self.module.text_encoder.register_buffer("grows", torch.zeros(2))
        encoder = MomentumEncoder(self.module)
        self.module.text_encoder.cache, self.module.text_encoder.grows = torch.ones(3), torch.ones(5)
        nn.init.constant_(self.module.image_encoder[2].running_mean, 7)
        encoder.update(self.module)
        assert (encoder.module.image_encoder[2].running_mean == 7).all()
        assert len(encoder.module.text_encoder.grows) == 2

    def test_parameters_that_come_later(self):
        encoder = MomentumEncoder(self.module)
        self.module.extra = nn.Linear(2, 2)
        with pytest.raises(
            RuntimeError, match=r"to keep its parameters, got \['extra.bias', 'extra.weight'\] new or gone"
        ):
            encoder.update(self.module)

    def test_a_module_that_cannot_be_copied(self):
        self.module.lock = threading.Lock()
        with pytest.raises(TypeError, match=r"Expected a Tiny that can be copied, got: cannot pickle .*Keep locks"):
            MomentumEncoder(self.module)

    def test_a_frozen_tower_may_be_of_half_precision(self):
        self.module.text_encoder.requires_grad_(False).bfloat16()
        assert MomentumEncoder(self.module)(self.batch).text_embeddings.dtype == torch.float32

    def test_weights_of_half_precision(self):
        with pytest.raises(TypeError, match=r"Expected float32 weights, got torch.bfloat16.*bf16-mixed"):
            MomentumEncoder(self.module.bfloat16())
