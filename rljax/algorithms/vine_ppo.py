"""VinePPO: values of reasoning steps by Monte Carlo instead of a critic (arXiv:2410.01679).

    Â_t = (reward of the step) + V̂(state after the step) - V̂(state before it)    for every token of the step

V̂(s) is the mean reward of several completions continued from s. `traj.values` holds it at the first token of each step
(other columns are not read), 0 after the last one: the experiment fills it. Decisions after the last of `step_ends` are
a step too. A step's reward may be on any of its tokens. The loss is PPO's without a critic.
"""

import jax.numpy as jnp

from rljax.algorithms.common.credit import decision_rewards, require
from rljax.algorithms.dapo import dapo
from rljax.ops.returns import td_errors
from rljax.ops.sequences import sequence_sum
from rljax.ops.shaping import step_numbers, step_starts
from rljax.types import Algorithm, Batch


def vine_ppo(low: float = 0.2, high: float = 0.2) -> Algorithm:
    """VinePPO."""

    def credit(traj, coefficients):
        require(traj, "step_ends", "values")
        rewards, mask = decision_rewards(traj)
        steps = step_numbers(traj.step_ends, mask)
        first = step_starts(traj.step_ends, mask)
        step_rewards = jnp.where(first, sequence_sum(rewards, mask, steps), 0.0)
        errors = td_errors(step_rewards, traj.values, first)  # from the first token of a step to that of the next
        advantages = jnp.where(mask, sequence_sum(errors, mask, steps), 0.0)
        return Batch(traj, advantages, mask, coefficients=coefficients)

    return dapo(low, high)._replace(credit=credit, group_signal=None, least_group=1)
