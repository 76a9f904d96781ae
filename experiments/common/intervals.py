"""95 % intervals of means over prompts."""

import math

import numpy as np

Z = 1.96  # standard errors


def standard_error_interval(values: np.ndarray) -> tuple[float, float]:
    """The mean of the values ± 1.96 of its standard errors; NaN of one value."""
    error = Z * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean() - error, values.mean() + error


def wilson_interval(values: np.ndarray, trials: int = 1) -> tuple[float, float]:
    """Wilson's score interval of the mean of shares, each of `trials` trials.

        (p + z²/2n ± z √(p (1 - p)/n + z²/4n²)) / (1 + z²/n)

    n is the number of independent trials that a mean of this variance has (Kish's effective sample size), p (1 - p)
    over the variance of the mean: the number of values where each is 0 or 1, more where the trials of a value differ,
    but never more than there are. It has a width where all values are equal, too.
    """
    p = values.mean()
    n = len(values)
    variance = values.var(ddof=1) / n if n > 1 else math.inf
    spread = p * (1.0 - p)
    if spread > 0:
        n = float(np.clip(spread / variance, n, n * trials)) if variance > 0 else n * trials
    center = p + Z**2 / (2 * n)
    half = Z * math.sqrt(spread / n + Z**2 / (4 * n**2))
    scale = 1.0 + Z**2 / n
    return max((center - half) / scale, 0.0), min((center + half) / scale, 1.0)
