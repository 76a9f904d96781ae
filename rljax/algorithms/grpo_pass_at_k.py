"""Advantages for the best of a group: optimising pass@k with k = G (arXiv:2503.19595).

    Â_i = (R_i - max_{j≠i} R_j) / (std_group R + ε)    for the one best answer of a group, 0 for the others

What an answer adds to the maximum of its group. Where two answers share the best reward neither adds anything. The loss
is GRPO's.
"""

import jax.numpy as jnp

from rljax.algorithms.common.credit import from_rewards
from rljax.algorithms.grpo import grpo
from rljax.ops import groups
from rljax.types import Algorithm


def grpo_pass_at_k(low: float = 0.2, high: float = 0.2, std_epsilon: float = 1e-6) -> Algorithm:
    """GRPO that rewards only what the best answer adds. A row alone in its group has advantage 0."""

    def advantage(rewards, group, valid):
        second = groups.leave_one_out_max(rewards, group, valid)
        gain = jnp.where(valid & jnp.isfinite(second), jnp.maximum(rewards - second, 0.0), 0.0)
        return gain / (groups.group_std(rewards, group, valid) + std_epsilon)

    return grpo(low, high)._replace(credit=from_rewards(advantage, "group"))
