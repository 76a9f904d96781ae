"""ODPO: DPO with an offset, by how much the better completion must be preferred (arXiv:2402.10571).

    L = (1/N) Σ_i -log σ(β(Δ_w - Δ_l) - δ_i)        δ_i = α log(score(y_w) - score(y_l))

`Pairs.margin` holds score(y_w) - score(y_l). A pair without a score (NaN), with equal scores or with scores in the
other order asks for no preference: its offset is -∞, so it adds nothing to loss and gradient.
"""

import jax.numpy as jnp

from rljax.algorithms.common.pairs import preference_objective
from rljax.ops import preferences
from rljax.ops.shapes import PerRow
from rljax.types import Objective, PolicyFn


def log_offset(margin: PerRow, alpha: float) -> PerRow:
    """α log margin; -∞ where the margin is not above 0."""
    rated = margin > 0
    return jnp.where(rated, alpha * jnp.log(jnp.where(rated, margin, 1.0)), -jnp.inf)


def odpo(policy: PolicyFn, beta: float = 0.1, alpha: float = 1.0) -> Objective:
    """ODPO over `Pairs` with a margin. Raises ValueError for pairs without one."""

    def term(pair):
        if pair.margin is None:
            raise ValueError("ODPO needs Pairs.margin: by how much the chosen completion is better")
        offset = log_offset(pair.margin, alpha)
        return preferences.odpo_loss(pair.chosen.log_ratio, pair.rejected.log_ratio, offset, beta)

    def reward(completion):
        return beta * completion.log_ratio

    return preference_objective(policy, term, reward, uses_margin=True)
