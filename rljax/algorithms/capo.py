"""CAPO: penalties of a judge on wrong steps as token rewards (arXiv:2508.02298, from its abstract).

    x_it = R_i + c_it        Â_it = (x_it - mean) / (std + ε)    over all decisions of the group

`traj.rewards` holds the outcome on the last decision and, on the other decisions that `step_ends` marks, the penalty of
the step that ends there (0 for a correct one), which all of its tokens get as c. How the paper weights outcome and
penalty is not known here; a penalty of the last step has no place beside the outcome. The loss is GRPO's.
"""

import jax.numpy as jnp

from rljax.algorithms.common.credit import decision_rewards, require
from rljax.algorithms.grpo import grpo
from rljax.ops import groups
from rljax.ops.sequences import last_decision, sequence_sum
from rljax.ops.shaping import step_numbers
from rljax.types import Algorithm, Batch


def capo(low: float = 0.2, high: float = 0.2, std_epsilon: float = 1e-6) -> Algorithm:
    """GRPO over token rewards: the outcome plus the penalty of the token's step."""

    def credit(traj, coefficients):
        require(traj, "group", "step_ends")
        rewards, mask = decision_rewards(traj)
        last = last_decision(mask)
        outcome = jnp.where(last, rewards, 0.0).sum(axis=1, keepdims=True)
        penalties = sequence_sum(jnp.where(last, 0.0, rewards), mask, step_numbers(traj.step_ends, mask))
        reward = outcome + penalties
        group = jnp.broadcast_to(traj.group[:, None], mask.shape)
        advantages = groups.standardize(reward.ravel(), group.ravel(), mask.ravel(), std_epsilon)
        return Batch(traj, advantages.reshape(mask.shape), mask, coefficients=coefficients)

    return grpo(low, high)._replace(credit=credit, group_signal=None, reads="steps")
