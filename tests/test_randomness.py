import random

import numpy as np
import pytest
import torch

from lightning_itm.randomness import part_random_streams, random_streams, restore_random_streams, seeded, uniform


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


class TestSeeded:
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

    def test_part_by_rank_and_alike_in_every_run(self):
        state, drawn = random_streams(), []
        for rank in (0, 1, 2, 1):
            restore_random_streams(state)
            part_random_streams(rank)
            drawn.append(draw())
        restore_random_streams(state)
        assert drawn[0] == draw()
        assert drawn[1] == drawn[3]
        assert all(len(set(stream)) == 3 for stream in zip(*drawn[:3], strict=True))
