"""A simulated panel of annotators, who compare completions by a known score, with noise, bias and disagreement.

Annotator a finds completion i, whose score is r_i and which has n_i tokens, worth

    u_ai = r_i + length_bias · n_i/100 + disagreement · ε_ai            ε ~ N(0, 1), an annotator's own taste

and prefers i to j with probability

    (1 - flip) p + flip (1 - p),        p = σ((u_ai - u_aj)/temperature)                   Bradley-Terry

A temperature of 0 makes p 1 where u_ai > u_aj, 0 where it is below, and 1/2 where both are equal. A pair whose
completions are worth the same to every annotator is left out. All draws are a function of the seed, the number of the
prompt and the pair.
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


def worths(scores: np.ndarray, lengths: np.ndarray, panel: Panel, seed: int, number: int) -> np.ndarray:
    """u [annotators, K] of the completions of prompt `number`. Args: scores, lengths: [K]."""
    taste = np.random.default_rng([seed, number, 0]).standard_normal((panel.annotators, len(scores)))
    return scores + panel.length_bias * lengths / 100.0 + panel.disagreement * taste


def votes(worth: np.ndarray, panel: Panel, seed: int, number: int) -> dict[tuple[int, int], np.ndarray]:
    """Pair (i, j), i < j -> bool [annotators]: whether each prefers i. A pair of equal worth to all is left out.

    Args: worth: u [annotators, K] of the completions of prompt `number`.
    """
    found = {}
    for i, j in itertools.combinations(range(worth.shape[1]), 2):
        difference = worth[:, i] - worth[:, j]
        drawn = np.random.default_rng([seed, number, 1, i, j]).random(len(difference))
        if difference.any():
            found[i, j] = drawn < preference_probability(difference, panel)
    return found


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
