import random
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import pytest
import torch

from lightning_itm.randomness import (
    part_random_streams,
    random_streams,
    restore_random_streams,
    seeded,
    stream_key,
    uniform,
)


def test_is_uniform_and_differs_with_every_part_of_the_key():
    ids = torch.arange(20_000)
    draws = [uniform(ids, *key) for key in ((0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1))]
    for draw in draws:
        assert draw.min() >= 0
        assert draw.max() < 1
        counts = torch.histc(draw, 20, 0, 1)
        assert ((counts - 1000).pow(2) / 1000).sum() < 50  # chi-square, 19 degrees of freedom
    for i, first in enumerate(draws):
        for second in draws[:i]:
            assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.03
    assert abs(torch.corrcoef(torch.stack([draws[0][1:], draws[0][:-1]]))[0, 1]) < 0.03


def draw():
    return float(torch.rand(())), random.random(), float(np.random.rand())


def draw_all():
    """Draw from each stream, from NumPy's and Python's also a normal number, of which they make two at once."""
    return (
        *draw(),
        float(torch.randn(())),
        float(np.random.standard_normal()),
        random.gauss(0, 1),
        np.random.get_state()[2],
    )


@contextmanager
def slow_seeded(*key):
    """Save all states, seed, and restore them."""
    states, seed = random_streams(), int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    yield
    restore_random_streams(states)


class TestSeeded:
    @pytest.mark.parametrize("num_drawn", [0, 1, 2])
    def test_equals_a_slow_version(self, num_drawn):
        """Within, after it, one within another, and where a normal number is left of two."""
        state, drawn = random_streams(), []
        for way in (slow_seeded, seeded):
            restore_random_streams(state)
            found = [draw_all() for _ in range(num_drawn)]
            for epoch in range(3):
                with way(5, epoch):
                    found += [draw_all() for _ in range(num_drawn + 1)]
                    with way(5, epoch, 7):
                        found.append(draw_all())
                    found.append(draw_all())
                found += [draw_all() for _ in range(num_drawn)]
            drawn.append(found)
        assert drawn[0] == drawn[1]

    def test_the_generators_are_the_same_afterwards(self):
        own = np.random.get_bit_generator()
        with seeded(3), seeded(4):
            assert np.random.get_bit_generator() is not own
        assert np.random.get_bit_generator() is own

    def test_every_part_of_the_key_counts(self):
        drawn = []
        for key in ((0, 0), (0, 1), (1, 0), (0, 0, 0)):
            with seeded(*key):
                drawn.append(draw())
        assert len(set(drawn)) == len(drawn)

    def test_leaves_the_streams_as_they_are_even_after_an_error(self):
        state = random_streams()
        expected = draw()
        restore_random_streams(state)
        with pytest.raises(ZeroDivisionError), seeded(3):
            draw()[0] / 0
        assert draw() == expected


class TestRandomStreams:
    def test_go_on_from_a_checkpoint(self, tmp_path):
        torch.save(random_streams(), tmp_path / "streams.pt")
        expected = [draw() for _ in range(3)]
        restore_random_streams(torch.load(tmp_path / "streams.pt", weights_only=True))
        assert [draw() for _ in range(3)] == expected

    def test_part_by_rank_and_key_alone(self):
        state, drawn = random_streams(), {}
        for rank, *key in ((0, 5, 7), (1, 5, 7), (2, 5, 7), (1, 5, 8), (1, 6, 7)):
            restore_random_streams(state)
            part_random_streams(rank, *key)
            drawn[(rank, *key)] = draw()
        restore_random_streams(state)
        assert drawn[0, 5, 7] == draw()
        part_random_streams(1, 5, 7)  # from wherever the streams stand
        assert drawn[1, 5, 7] == draw()
        assert all(len(set(stream)) == 5 for stream in zip(*drawn.values(), strict=True))

    def test_a_key_draws_nothing(self):
        torch.manual_seed(3)
        key, state = stream_key(), torch.get_rng_state()
        assert stream_key() == key
        assert torch.equal(state, torch.get_rng_state())
        torch.rand(())
        assert stream_key() != key
