"""Pooling of padded sequences of several lengths, without a host read: a bidirectional GRU, and GPO."""

import math

import torch
from torch import Tensor, nn

PADDING_SCORE = -10_000.0  # fits fp16


class BidirectionalGRU(nn.Module):
    """Read sequences with one GRU forward and one backward, and average the two.

    Each GRU begins at its own end of a sequence, so padding comes last for both. No length is read by the host.

    Args:
        input_dim: The width of the input vectors, such as 300 for words.
        hidden_dim: The width of the output vectors, such as 1024.
    """

    def __init__(self, input_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.forward_gru = nn.GRU(input_dim, hidden_dim, batch_first=True)
        self.backward_gru = nn.GRU(input_dim, hidden_dim, batch_first=True)

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        """Return `(sequences, longest, hidden_dim)` from `(sequences, longest, input_dim)`. Ignore it past the lengths."""
        ahead, _ = self.forward_gru(values)
        behind, _ = self.backward_gru(_reversed(values, lengths))
        return (ahead + _reversed(behind, lengths)) / 2  # type: ignore[no-any-return]


class GeneralizedPooling(nn.Module):
    r"""Pool a set of vectors into one by a learned weighting of its sorted values (GPO).

    In plain terms: mean pooling weights all values alike, max pooling only the largest. This learns weights between the two,
    for each size of the set.

    .. math:: \sum_{k=1}^{n} \theta_k(n) \max{}_k(x_1, \dots, x_n)

    where :math:`\max_k` is the k-th largest value, dimension by dimension, and θ comes from a small GRU over codes of the
    positions 1 … n.

    Args:
        code_dim: The width of the sinusoidal codes of the positions. The default, 32, is the paper's.
        hidden_dim: The width of the GRU that turns codes into weights. The default, 32, is the paper's.
        temperature: The temperature of the softmax over positions. A smaller one lets single positions dominate.

    Example:
        >>> import torch
        >>> from lightning_itm.models import GeneralizedPooling
        >>> pooling = GeneralizedPooling()
        >>> pooled = pooling(torch.tensor([[[2.0], [2.0], [0.0]]]), torch.tensor([2]))  # the third is padding
        >>> pooled.detach().round(decimals=4)  # the weights, which are random, sum to 1
        tensor([[2.]])

    References:
        Chen et al., *Learning the Best Pooling Strategy for Visual Semantic Embedding*, CVPR 2021, arXiv 2011.04305.
    """

    def __init__(self, code_dim: int = 32, hidden_dim: int = 32, temperature: float = 0.1) -> None:
        super().__init__()
        self.code_dim, self.temperature = code_dim, temperature
        self.gru = BidirectionalGRU(code_dim, hidden_dim)
        self.linear = nn.Linear(hidden_dim, 1, bias=False)

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        """Return `(sets, dim)` from `(sets, longest, dim)` and the number of items of each set."""
        is_padding = (torch.arange(values.shape[1], device=values.device) >= lengths[:, None])[:, :, None]
        # Sorted dimension by dimension, (sets, longest, dim). Padding sorts last, whatever it holds.
        ordered = values.masked_fill(is_padding, PADDING_SCORE).sort(dim=1, descending=True).values
        weights = self.weights(values.shape[1])[lengths - 1]  # (sets, longest)
        return (ordered.masked_fill(is_padding, 0) * weights[:, :, None]).sum(dim=1)

    def weights(self, longest: int) -> Tensor:
        """Return θ for sets of 1 to ``longest`` items, `(longest, longest)`. Row n − 1 is for n items."""
        # For every size at once: picking the sizes that occur would need their number, which only the device knows.
        like = self.linear.weight
        sizes = torch.arange(1, longest + 1, device=like.device)
        is_padding = torch.arange(longest, device=like.device) >= sizes[:, None]
        codes = _position_codes(longest, self.code_dim, like).expand(longest, -1, -1)
        scores = self.linear(self.gru(codes.masked_fill(is_padding[:, :, None], 0), sizes)).squeeze(2)
        # Not in half precision: the division by the temperature makes small differences large.
        scores = scores.float() if scores.dtype != torch.float64 else scores
        weights: Tensor = (scores.masked_fill(is_padding, PADDING_SCORE) / self.temperature).softmax(dim=1)
        return weights


def _reversed(values: Tensor, lengths: Tensor) -> Tensor:
    """Turn each sequence around within its length."""
    column = torch.arange(values.shape[1], device=values.device)
    # (sequences, longest): where each value comes from. Padding stays where it is, so it comes last again.
    index = torch.where(column < lengths[:, None], lengths[:, None] - 1 - column, column)
    return values.gather(1, index[:, :, None].expand_as(values))


def _position_codes(length: int, dim: int, like: Tensor) -> Tensor:
    """Return sinusoidal codes `(length, dim)` with sines at even columns, computed in float32 as published."""
    rate = torch.exp(torch.arange(0, dim, 2, device=like.device) * (-math.log(10_000.0) / dim))
    angle = torch.arange(length, device=like.device)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1).to(like.dtype)
