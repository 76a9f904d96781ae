"""A simulated panel of annotators, who compare completions by a known score, with noise, bias and disagreement.

Annotator a finds completion i, whose score is r_i and which has n_i tokens, worth

    u_ai = r_i + length_bias · n_i/100 + disagreement · ε_ai            ε ~ N(0, 1), an annotator's own taste

and prefers i to j with probability

    (1 - flip) p + flip (1 - p),        p = σ((u_ai - u_aj)/temperature)                   Bradley-Terry

A temperature of 0 makes p 1 where u_ai > u_aj, 0 where it is below, and 1/2 where both are equal. All draws are a
function of the seed and of the number of the prompt.
"""

import itertools

import numpy as np

from experiments.common.settings import Panel


def preference_probability(difference: np.ndarray, panel: Panel) -> np.ndarray:
    """The probability that the first of two completions is preferred, whose worth differs by so much."""
    if panel.temperature == 0:
        p = np.where(difference == 0, 0.5, difference > 0)
    else:
        p = 1.0 / (1.0 + np.exp(-np.clip(difference / panel.temperature, -500, 500)))
    return (1.0 - panel.flip) * p + panel.flip * (1.0 - p)


def votes(scores: np.ndarray, lengths: np.ndarray, panel: Panel, seed: int, number: int) -> np.ndarray:
    """bool [pairs, annotators]: whether each annotator prefers the first of each pair (0, 1), (0, 2), ... (1, 2), ...

    Args: scores, lengths: [K] of the completions of prompt `number`.
    """
    rng = np.random.default_rng([seed, number])
    K = len(scores)
    taste = rng.standard_normal((panel.annotators, K))
    worth = scores + panel.length_bias * lengths / 100.0 + panel.disagreement * taste
    first, second = np.array(list(itertools.combinations(range(K), 2))).T
    probability = preference_probability(worth[:, first] - worth[:, second], panel)
    return (rng.random(probability.shape) < probability).T


def check_panel(panel: Panel) -> None:
    """Raise ValueError for a panel that cannot be."""
    wrong = []
    if panel.annotators < 1:
        wrong.append(f"annotators = {panel.annotators}; at least 1")
    if not 0 <= panel.flip <= 0.5:
        wrong.append(f"flip = {panel.flip}; from 0 to 0.5")
    if panel.temperature < 0 or panel.disagreement < 0:
        wrong.append(f"temperature = {panel.temperature}, disagreement = {panel.disagreement}; at least 0 each")
    if wrong:
        raise ValueError(f"no such panel of annotators: {'; '.join(wrong)}")
