"""False negative elimination, one candidate at a time, for tests to compare with."""

import math


def log_density(x, mean, var):
    return -0.5 * (x - mean) ** 2 / var - 0.5 * math.log(2 * math.pi * var)


def posterior(s, positive_mean, positive_var, negative_mean, negative_var, prior):
    """The definition, with the densities' common factor taken out so that no exponential underflows to 0/0."""
    match = math.log(prior) + log_density(s, positive_mean, positive_var)
    other = math.log(1 - prior) + log_density(s, negative_mean, negative_var)
    top = max(match, other)
    return math.exp(match - top) / (math.exp(match - top) + math.exp(other - top))


def weight(s, positive, is_negative, likely, *, sharpness, threshold, weighting, cut):
    if not is_negative or (cut is not None and s <= cut):
        return 0.0
    if likely > threshold:
        return {"exp": math.exp(-sharpness * likely), "complement": 1 - likely, "drop": 0.0}[weighting]
    return math.exp(-sharpness * (s - positive) ** 2)


def draw(weights, number):
    """The first candidate at which the running sum passes the number's share of the total; None without any weight."""
    total, running = sum(weights), 0.0
    for index, w in enumerate(weights):
        running += w
        if running > number * total:
            return index
    return None
