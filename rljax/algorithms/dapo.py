"""DAPO: decoupled clip and dynamic sampling (arXiv:2503.14476).

    L = (1/Σ_i n_i) Σ_i Σ_t max(-ρÂ, -clip(ρ, 1 - 0.2, 1 + 0.28) Â)        Â as in GRPO, no KL term

The wider upper clip lets unlikely tokens grow; the token mean gives long answers their full weight. The rest of the
paper composes: `dynamic_sampling` (section 3.2), `filter_overlong` and `overlong_penalty` (section
3.4, in `shape`).
"""

from rljax.algorithms.grpo import grpo
from rljax.ops.weights import token_mean
from rljax.types import Algorithm


def dapo(low: float = 0.2, high: float = 0.28) -> Algorithm:
    """DAPO's loss: GRPO with clip-higher and the token mean."""
    return grpo(low, high, weights=token_mean)
