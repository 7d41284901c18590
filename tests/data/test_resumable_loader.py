import random

import numpy as np
import pytest
import torch

from lightning_itm.data import EpochSampler, SeededDataset
from tests.helpers.resume import EPOCHS, NUM_PAIRS, fit
from tests.helpers.tiny import Tiny, tiny_data, tiny_pairs


def test_augmentation_is_a_function_of_seed_epoch_and_pair():
    pairs = SeededDataset(tiny_pairs())
    first = pairs[2]["image"]
    assert torch.equal(first, SeededDataset(tiny_pairs())[2]["image"])
    assert not torch.equal(first, SeededDataset(tiny_pairs(), seed=1)[2]["image"])
    pairs.epoch.fill_(1)
    assert not torch.equal(first, pairs[2]["image"])


def test_loading_pairs_does_not_touch_the_random_streams():
    """Else dropout would draw other masks with workers than without."""
    pairs = SeededDataset(tiny_data().train_dataset)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    pairs[3]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()


def test_every_epoch_has_another_order_and_every_pair_once():
    _, seen = fit(Tiny, {})
    orders = [[pair for epoch, _, pairs, *_ in seen if epoch == number for pair in pairs] for number in range(EPOCHS)]
    assert all(sorted(order) == list(range(NUM_PAIRS)) for order in orders)
    assert len({tuple(order) for order in orders}) == EPOCHS


class TestEpochSampler:
    BATCH_SIZE = 4

    def indices(self, epoch, num_done=0, **options):
        sampler = EpochSampler(SeededDataset(tiny_pairs()), self.BATCH_SIZE, lambda: (epoch, num_done), **options)
        return list(sampler)

    @pytest.mark.parametrize("num_done", [0, 1, 5])
    def test_goes_on_with_the_rest_of_the_same_order(self, num_done):
        assert self.indices(2, num_done) == self.indices(2)[num_done * self.BATCH_SIZE :]

    def test_order_is_a_function_of_seed_and_epoch(self):
        assert self.indices(1, seed=3) == self.indices(1, seed=3)
        assert self.indices(1, seed=3) != self.indices(2, seed=3)
        assert self.indices(1, seed=3) != self.indices(1, seed=4)

    def test_ranks_share_an_epoch(self):
        parts = [self.indices(1, num_replicas=2, rank=rank) for rank in range(2)]
        assert sorted(parts[0] + parts[1]) == list(range(NUM_PAIRS))

    def test_tells_the_dataset_the_epoch(self):
        """Whose copies in running workers see it."""
        pairs = SeededDataset(tiny_pairs())
        iter(EpochSampler(pairs, self.BATCH_SIZE, lambda: (7, 0)))
        assert int(pairs.epoch) == 7
