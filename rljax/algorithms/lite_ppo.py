"""Lite PPO: two tricks on a critic-free PPO (arXiv:2508.08221).

    Â_it = (R_i - mean_group R) / (std_batch R + ε)        L = token mean of GRPO's clipped terms

The mean is the group's and the deviation the whole batch's: a group of nearly equal rewards is not blown up. The clip
is DAPO's.
"""

import jax.numpy as jnp

from rljax.algorithms.common.credit import from_rewards
from rljax.algorithms.grpo import grpo
from rljax.ops import groups
from rljax.ops.statistics import masked_var
from rljax.ops.weights import token_mean
from rljax.types import Algorithm


def lite_ppo(low: float = 0.2, high: float = 0.28, std_epsilon: float = 1e-6) -> Algorithm:
    """GRPO with the batch's deviation and the token mean."""

    def advantage(rewards, group, valid):
        return groups.center(rewards, group, valid) / (jnp.sqrt(masked_var(rewards, valid)) + std_epsilon)

    return grpo(low, high, weights=token_mean)._replace(credit=from_rewards(advantage, "group"))
