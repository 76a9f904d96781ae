"""Dr.GRPO: GRPO done right (arXiv:2503.20783).

    Â_it = R_i - mean_group R          L = (1/(N⁺ C)) Σ_i Σ_t max(-ρÂ, -clip(ρ) Â)

Two divisions of GRPO are gone: by the group's standard deviation, which favours prompts that are nearly always or never
solved, and by the answer's own length, which favours long wrong answers. C is a constant: the most tokens an answer may
have, not the width of a batch. The gradient is RLOO's times (G - 1)/(G C).
"""

from rljax.algorithms.grpo import grpo
from rljax.ops.weights import seq_mean_token_sum_norm
from rljax.types import Algorithm


def dr_grpo(longest: float, low: float = 0.2, high: float = 0.2) -> Algorithm:
    """Dr.GRPO. `longest`: C, the most tokens an answer may have."""
    return grpo(low, high, std_epsilon=None, weights=seq_mean_token_sum_norm(longest))
