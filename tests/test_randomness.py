import torch

from lightning_itm.randomness import uniform


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
