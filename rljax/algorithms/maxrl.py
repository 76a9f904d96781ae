"""MaxRL: from expected reward towards maximum likelihood of success (arXiv:2602.02710).

    Â_i = (R_i - mean_group R) / mean_group R        0 without a success        L = -(1/N⁺) Σ_i Σ_t Â_i log π

For binary rewards dividing by the success rate turns the gradient of E[R] into one of a truncated expansion of
log E[R]: hard prompts weigh more. For rewards of other signs the quotient has no such meaning, so nothing may be added
to them (`kl_in_reward`).
"""

import jax.numpy as jnp

from rljax.algorithms.common.credit import from_rewards
from rljax.algorithms.reinforce import reinforce
from rljax.ops import groups
from rljax.types import Algorithm


def maxrl() -> Algorithm:
    """MaxRL, for rewards of 0 and 1."""

    def advantage(rewards, group, valid):
        mean = groups.group_mean(rewards, group, valid)
        return jnp.where(mean > 0, groups.center(rewards, group, valid) / jnp.where(mean > 0, mean, 1.0), 0.0)

    return reinforce()._replace(credit=from_rewards(advantage, "group"), reads="correct")
