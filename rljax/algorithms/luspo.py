"""LUSPO: GSPO without its preference for short answers (arXiv:2602.05261).

    L = (1/N⁺) Σ_i n_i max(-s_i Â_i, -clip(s_i, 1 - low, 1 + high) Â_i)

GSPO's geometric mean divides each answer's gradient by its length; the factor n_i takes that back.
"""

from rljax.algorithms.gspo import gspo
from rljax.ops.weights import seq_mean_token_sum
from rljax.types import Algorithm


def luspo(low: float = 2e-3, high: float = 2.5e-3) -> Algorithm:
    """GSPO summed over the tokens of each answer."""
    return gspo(low, high)._replace(weights=seq_mean_token_sum)
