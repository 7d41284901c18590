"""How likely a candidate of a memory bank matches, read off two histograms of cosine similarity."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NUM_BINS = 400
"""Bins of equal width on [−1, 1]. Each is 0.005 wide, because the similarities of pretrained models are close together."""

SMALLEST_TAIL = 0.5
"""The matching fraction is estimated from upper tails that hold at least this fraction of the positives."""


def similarity_bin(similarity: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Find the bin of each cosine similarity.

    Args:
        similarity: Cosines, of any shape. Rounding errors beyond ±1 fall into the outermost bins.

    Returns:
        Bins from 0 to 399, as int32, which is twice as fast to look up as int64.

    Example:
        >>> import torch
        >>> from lightning_itm.functional.posterior import similarity_bin
        >>> similarity_bin(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([  0, 200, 399], dtype=torch.int32)
    """
    scaled = similarity.detach() * (NUM_BINS / 2) + NUM_BINS / 2
    return scaled.int().clamp_(0, NUM_BINS - 1)


def count_bins(bins: Int[Tensor, "*shape"], counts: Bool[Tensor, "*shape"]) -> Float[Tensor, " bins"]:
    """Count how many similarities fall into each bin. The host waits for nothing.

    Args:
        bins: What :func:`similarity_bin` returns.
        counts: True for the similarities that count.

    Returns:
        One number per bin, `(400,)`, in float64 (float32 on MPS, which has no float64).
    """
    # What does not count gets a bin of its own at the end, which is cut off.
    flat = bins.masked_fill(~counts, NUM_BINS).flatten()
    # On CUDA, `bincount` makes the host wait, and `histc` of integers does not.
    histogram = flat.histc(NUM_BINS + 1, 0, NUM_BINS) if flat.is_cuda else flat.bincount(minlength=NUM_BINS + 1)
    return histogram[:NUM_BINS].to(torch.float32 if flat.device.type == "mps" else torch.float64)


def histogram_posterior(
    positive_counts: Float[Tensor, " bins"], candidate_counts: Float[Tensor, " bins"]
) -> Float[Tensor, " bins"]:
    r"""Compute, for each bin of similarity, the probability that a candidate matches, though it belongs to another image.

    .. math:: P(s) = \min\left(1, \hat\pi\,\frac{f^+(s)}{f(s)}\right), \qquad
              \hat\pi = \min_{t:\,F^+(t) \ge 1/2} \frac{F(t)}{F^+(t)}

    :math:`f^+` is the density of matching pairs and :math:`f` that of all candidates of other images, most of which do not
    match. :math:`F^+(t)` and :math:`F(t)` are the fractions of both above t. If candidates that match are as similar as
    other matching pairs, then :math:`F \ge \pi F^+`, so that no fraction π of matching candidates can be larger than
    :math:`\hat\pi`. P is made monotone by isotonic regression: a more similar candidate is never less likely to match.

    In contrast to :func:`false_negative_posterior`, neither the size of the batch nor a prior nor the shape of the
    distributions matters. Not in the paper.

    Args:
        positive_counts: How many matching pairs fall into each bin, from low to high similarity.
        candidate_counts: How many comparisons with candidates of other images do, of the same anchors.

    Returns:
        P for each bin, between 0 and 1 and never falling. 0 everywhere if there are no positives or no candidates.

    Example:
        >>> import torch
        >>> from lightning_itm.functional import histogram_posterior
        >>> positives = torch.tensor([0.0, 0.0, 50.0, 50.0])
        >>> candidates = torch.tensor([900.0, 98.0, 1.0, 1.0])
        >>> histogram_posterior(positives, candidates)
        tensor([0., 0., 1., 1.])

    References:
        Isotonic regression by the max-min formula: Robertson, Wright and Dykstra, *Order Restricted Statistical Inference*,
        Wiley, 1988, chapter 1.
    """
    positive_tail, candidate_tail = _upper_tails(positive_counts), _upper_tails(candidate_counts)  # (bins + 1,)
    num_positives = positive_tail[0].clamp_min(1)
    is_enough = positive_tail >= SMALLEST_TAIL * num_positives
    ratio = torch.where(is_enough, candidate_tail / positive_tail, candidate_tail[0])
    scale = ratio.amin()  # π̂ times all candidates, per positive
    return _isotonic_ratio(positive_tail * scale, candidate_tail).clamp_max(1)


def _upper_tails(counts: Tensor) -> Tensor:
    """Sum from each bin up, `(bins + 1,)`. It starts at the top, where counts are small and must stay exact."""
    return torch.nn.functional.pad(counts.flip(0).cumsum(0).flip(0), (0, 1))


def _isotonic_ratio(numerator_tail: Tensor, denominator_tail: Tensor) -> Tensor:
    """Fit the ratio of two histograms, given their upper tails, by a sequence that never falls, `(bins,)`.

    The value of bin k is the largest over i ≤ k of the smallest over j ≥ k of the ratio of the sums over bins i to j.
    """
    numerator, denominator = (
        tail[:-1, None] - tail[None, 1:] for tail in (numerator_tail, denominator_tail)
    )  # (bins, bins), the sums over bins i to j
    # Less than one comparison is no evidence: an empty block takes the value below it.
    ratio = numerator / denominator.clamp_min(1)
    below = torch.ones_like(ratio, dtype=torch.bool).tril(-1)  # j < i: no block
    smallest = ratio.masked_fill(below, torch.inf).flip(1).cummin(1).values.flip(1)  # (i, k), over j ≥ k
    return smallest.masked_fill(below, 0).amax(0)
