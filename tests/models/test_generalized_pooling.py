import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_itm.models import GeneralizedPooling
from lightning_itm.models.generalized_pooling import BidirectionalGRU


def test_both_ways_equal_a_packed_gru():
    """PyTorch's own, which reads the lengths on the host."""
    ours, packed = BidirectionalGRU(3, 4), nn.GRU(3, 4, batch_first=True, bidirectional=True)
    state = dict(ours.forward_gru.state_dict())
    state |= {f"{name}_reverse": value for name, value in ours.backward_gru.state_dict().items()}
    packed.load_state_dict(state)
    values, lengths = torch.randn(5, 7, 3), torch.tensor([7, 1, 4, 2, 6])
    output, _ = packed(pack_padded_sequence(values, lengths, batch_first=True, enforce_sorted=False))
    expected, _ = pad_packed_sequence(output, batch_first=True)
    got = ours(values, lengths)
    for row, length in enumerate(lengths.tolist()):
        both = (expected[row, :length, :4] + expected[row, :length, 4:]) / 2
        torch.testing.assert_close(got[row, :length], both)


class TestPooling:
    def test_weights_are_a_distribution_over_each_size(self):
        weights = GeneralizedPooling().weights(6)
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(6))
        assert (weights.triu(1) == 0).all()

    def test_equals_the_sum_over_ranks(self):
        pooling, values, lengths = GeneralizedPooling(), torch.randn(3, 5, 2), [5, 2, 1]
        got = pooling(values, torch.tensor(lengths))
        for row, length in enumerate(lengths):
            weights = pooling.weights(5)[length - 1].tolist()
            for column in range(2):
                ordered = sorted(values[row, :length, column].tolist(), reverse=True)
                expected = sum(weight * value for weight, value in zip(weights, ordered, strict=False))
                assert got[row, column].item() == pytest.approx(expected, abs=1e-6)

    def test_order_and_padding_are_no_matter(self):
        pooling, values = GeneralizedPooling(), torch.randn(1, 4, 3)
        expected = pooling(values, torch.tensor([4]))
        padded = torch.cat([values[:, [2, 0, 3, 1]], torch.full((1, 3, 3), 50.0)], dim=1)
        torch.testing.assert_close(pooling(padded, torch.tensor([4])), expected)
