r"""False negative elimination: how likely a candidate matches, and a draw of negatives that avoids likely matches."""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_itm.functional.similarity import DirectionScores

MIN_VARIANCE = 1e-8
"""The floor of the variances, which is a standard deviation of 1e-4 in units of cosine similarity."""

Weighting = Literal["exp", "complement", "drop"]


class SimilarityFit(NamedTuple):
    """Two normal distributions of cosine similarity: of matching pairs, and of their hardest negatives."""

    positive_mean: Float[Tensor, ""]
    positive_var: Float[Tensor, ""]
    negative_mean: Float[Tensor, ""]
    negative_var: Float[Tensor, ""]


class DrawnNegative(NamedTuple):
    """One negative for each anchor."""

    candidate_index: Int[Tensor, " anchors"]
    """The index of each among the candidates."""
    is_negative: Bool[Tensor, " anchors"]
    """False for an anchor without any negative, whose index means nothing."""
    is_fallback: Bool[Tensor, " anchors"]
    """True where no candidate had any weight, and the hardest negative was taken."""


def false_negative_posterior(
    similarity: Float[Tensor, "*shape"],
    *,
    positive_mean: Float[Tensor, ""] | float,
    positive_var: Float[Tensor, ""] | float,
    negative_mean: Float[Tensor, ""] | float,
    negative_var: Float[Tensor, ""] | float,
    prior: float = 1e-4,
    monotone: bool = False,
) -> Float[Tensor, "*shape"]:
    r"""Compute the probability that a candidate of this similarity matches, though it belongs to another image.

    .. math:: P(s) = \frac{\pi\,p^+(s)}{\pi\,p^+(s) + (1 - \pi)\,p^-(s)} = \sigma(\ell(s)), \qquad
              p^\pm = \mathcal{N}(\mu^\pm, v^\pm)

    The log-odds :math:`\ell` are a parabola. It is evaluated around its root, where P = 1/2, so that float32 is as exact as
    the similarities themselves. The ratio of the densities would be 0/0 for ordinary values.

    Args:
        similarity: Cosines, of any shape. Half precision is computed in float32.
        positive_mean: Mean similarity of matching pairs.
        positive_var: Variance of the similarity of matching pairs. Below 1e-8 it counts as 1e-8.
        negative_mean: Mean similarity of the hardest negatives.
        negative_var: Variance of the similarity of the hardest negatives, with the same floor.
        prior: π, the fraction of candidates that match, typically 1e-4. Raise it where captions are short and alike.
        monotone: Let P be 0 below ``negative_mean`` and never fall above it. Without it, as in the paper, P falls
            again towards
            s = 1 where the positives vary less than the negatives: a near-duplicate counts as a true negative. Not in
            the paper.

    Returns:
        P, between 0 and 1, finite for every similarity in [−1, 1] and finite statistics. It has no gradient.

    Raises:
        ValueError: ``prior`` is not between 0 and 1.

    Example:
        >>> import torch
        >>> from lightning_itm.functional import false_negative_posterior
        >>> fit = dict(positive_mean=0.65, positive_var=0.05**2, negative_mean=0.4, negative_var=0.08**2)
        >>> false_negative_posterior(torch.tensor([0.6, 0.8, 1.0]), **fit)
        tensor([0.0022, 0.3230, 0.0060])
        >>> false_negative_posterior(torch.tensor([0.6, 0.8, 1.0]), **fit, monotone=True)
        tensor([0.0022, 0.3230, 0.3258])

    References:
        *Your Negative May not Be True Negative: Boosting Image-Text Matching with False Negative Elimination*,
        arXiv 2308.04380 (2023). The published code divides densities, which gives NaN.
    """
    statistics = (positive_mean, positive_var, negative_mean, negative_var)
    wide = torch.float32 if similarity.device.type == "mps" else torch.float64
    fit = SimilarityFit(*(torch.as_tensor(value, dtype=wide, device=similarity.device) for value in statistics))
    return match_odds(fit, prior, monotone=monotone).posterior(similarity)


class MatchOdds(NamedTuple):
    """The log-odds of a match, a parabola: offset + (s − origin) (slope + curvature (s − origin))."""

    origin: Float[Tensor, ""]
    offset: Float[Tensor, ""]
    slope: Float[Tensor, ""]
    curvature: Float[Tensor, ""]
    rising: tuple[Float[Tensor, ""], Float[Tensor, ""]] | None
    """Where P does not fall, with ``monotone``: from the mean of the negatives to the top of the parabola, or +inf."""

    def posterior(self, similarity: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Compute P, as :func:`false_negative_posterior` does."""
        similarity = similarity.detach()
        if similarity.dtype in (torch.float16, torch.bfloat16):
            similarity = similarity.float()
        if self.rising is None:
            return self._at(similarity).sigmoid_()
        low, high = (value.to(similarity.dtype) for value in self.rising)
        log_odds = torch.maximum(self._at(torch.minimum(similarity, high)), self._at(low))
        return log_odds.sigmoid_().masked_fill_(similarity < low, 0)

    def _at(self, similarity: Tensor) -> Tensor:
        origin, offset, slope, curvature = (value.to(similarity.dtype) for value in self[:4])
        distance = similarity - origin
        return torch.addcmul(slope, distance, curvature).mul_(distance).add_(offset)


def match_odds(fit: SimilarityFit, prior: float, *, monotone: bool = False) -> MatchOdds:
    """Find the coefficients of the log-odds of a match, in double precision.

    Args:
        fit: Mean and variance of both distributions.
        prior: The fraction of candidates that match, between 0 and 1, typically 1e-4.
        monotone: Let the odds never fall with similarity. Not in the paper.

    Raises:
        ValueError: ``prior`` is not between 0 and 1.
    """
    if not 0 < prior < 1:
        raise ValueError(f"Expected `prior` to be between 0 and 1, got {prior}.")
    positive_mean, positive_var, negative_mean, negative_var = fit
    positive_var, negative_var = positive_var.clamp_min(MIN_VARIANCE), negative_var.clamp_min(MIN_VARIANCE)
    # In x = s − negative_mean: c + b x + a x².
    gap = positive_mean - negative_mean
    a = 0.5 / negative_var - 0.5 / positive_var
    b = gap / positive_var
    c = math.log(prior / (1 - prior)) + 0.5 * (negative_var / positive_var).log() - 0.5 * gap.square() / positive_var
    safe_a = torch.where(a == 0, 1.0, a)
    vertex = torch.where(a == 0, torch.inf, -b / (2 * safe_a))
    discriminant = b.square() - 4 * a * c
    slope_at_root = torch.where(b < 0, -1.0, 1.0) * discriminant.clamp_min(0).sqrt()
    root = -2 * c / (b + slope_at_root)
    # Around the root, if there is one within reach of a cosine; else around the vertex; else where x = 0.
    has_root, near_vertex = (discriminant > 0) & (root.abs() <= 4), (discriminant <= 0) & (vertex.abs() <= 4)
    top = torch.where(a < 0, negative_mean + vertex, torch.inf)
    return MatchOdds(
        origin=negative_mean + torch.where(has_root, root, torch.where(near_vertex, vertex, 0.0)),
        offset=torch.where(has_root, 0.0, torch.where(near_vertex, c - b.square() / (4 * safe_a), c)),
        slope=torch.where(has_root, slope_at_root, torch.where(near_vertex, 0.0, b)),
        curvature=a,
        rising=(negative_mean, torch.maximum(top, negative_mean)) if monotone else None,
    )


def sampling_weights(
    scores: DirectionScores,
    posterior: Float[Tensor, "anchors candidates"],
    *,
    sharpness: float = 0.5,
    threshold: float = 1e-3,
    weighting: Weighting = "exp",
    cut: Float[Tensor, ""] | Float[Tensor, "anchors 1"] | None = None,
) -> Float[Tensor, "anchors candidates"]:
    r"""Weigh the candidates of each anchor by hardness, and those that are likely to match by how likely it is.

    .. math:: w = \begin{cases} f(P) & P > \theta \\ e^{-\tau (s - s^+)^2} & \text{else} \end{cases}
              \qquad f(P) = e^{-\tau P},\; 1 - P,\; \text{or}\; 0

    Args:
        scores: The scores of one direction.
        posterior: P, as :func:`false_negative_posterior` returns it.
        sharpness: τ. (The paper calls it a temperature, but it multiplies.)
        threshold: θ, above which a candidate is taken for a likely match.
        weighting: f. ``"exp"`` as published, which never falls below e^−τ = 0.61. ``"complement"`` and ``"drop"``
            avoid likely matches more strongly. Not in the paper.
        cut: Candidates with a similarity up to this weigh nothing. ``None``: no such limit.

    Returns:
        Weights, 0 for everything that is no negative. They are not normalised and have no gradient.

    References:
        arXiv 2308.04380 (2023).
    """
    # (anchors, candidates), without gradient: weights choose a negative and are not trained.
    similarity = scores.similarity.detach()
    is_likely = posterior > threshold
    weights = (similarity - scores.positive.detach()[:, None]).square_()
    if weighting == "exp":
        weights = torch.where(is_likely, posterior, weights).mul_(-sharpness).exp_()
    elif weighting == "complement":
        weights = torch.where(is_likely, 1 - posterior, weights.mul_(-sharpness).exp_())
    else:
        weights = weights.mul_(-sharpness).exp_().masked_fill_(is_likely, 0)
    kept = scores.negative_mask if cut is None else scores.negative_mask & (similarity > cut)
    return weights.masked_fill_(~kept, 0)


def draw_negative(
    scores: DirectionScores, weights: Float[Tensor, "anchors candidates"], uniform: Float[Tensor, " anchors"]
) -> DrawnNegative:
    """Draw one negative for each anchor, with a probability in proportion to its weight.

    The host waits for nothing, and there may be any number of candidates.

    Args:
        scores: The scores of one direction.
        weights: What :func:`sampling_weights` returns, at least 0.
        uniform: A number in [0, 1) for each anchor, which decides the draw.

    Returns:
        The draw. Where no candidate has any weight, it is the negative with the highest similarity.
    """
    # The draw by inversion: torch.multinomial would make the host wait and limits the number of candidates.
    cumulative = weights.cumsum(dim=1)
    total = cumulative[:, -1:]
    # Never the total itself, beyond which there is nothing.
    target = torch.minimum(uniform[:, None].to(total.dtype) * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, target, right=True).clamp_max_(weights.shape[1] - 1)
    hardest = scores.similarity.masked_fill(~scores.negative_mask, -torch.inf).max(dim=1)
    is_drawn = weights.gather(1, drawn).squeeze(1) > 0
    is_negative = hardest.values > -torch.inf
    # (anchors,): an anchor whose weights are all zero falls back on its hardest negative.
    index = torch.where(is_drawn, drawn.squeeze(1), hardest.indices)
    return DrawnNegative(index, is_negative, is_negative & ~is_drawn)
