"""GRPO with process supervision (DeepSeekMath, arXiv:2402.03300, section 4.1.3).

    r̃_j = (r_j - mean) / (std + ε)    over all step rewards of all completions of the group
    Â_it = Σ_{j: step j ends at or after t} r̃_ij

r_j is the sum of the rewards on the decisions of step j; steps end where `step_ends` says so and at the last decision.
With one step per completion it is GRPO with outcome supervision. The loss is GRPO's.
"""

import jax.numpy as jnp

from rljax.algorithms.common.credit import decision_rewards, require
from rljax.algorithms.grpo import grpo
from rljax.ops import groups
from rljax.ops.returns import discounted_returns
from rljax.ops.sequences import last_decision, sequence_sum
from rljax.ops.shaping import step_numbers
from rljax.types import Algorithm, Batch


def grpo_process(low: float = 0.2, high: float = 0.2, std_epsilon: float = 1e-6) -> Algorithm:
    """GRPO whose advantages are sums of normalized rewards of this and later steps."""

    def credit(traj, coefficients):
        require(traj, "group", "step_ends")
        rewards, mask = decision_rewards(traj)
        ends = mask & (traj.step_ends | last_decision(mask))
        step_rewards = sequence_sum(rewards, mask, step_numbers(ends, mask))
        group = jnp.broadcast_to(traj.group[:, None], mask.shape)
        normalized = groups.standardize(step_rewards.ravel(), group.ravel(), ends.ravel(), std_epsilon)
        advantages = discounted_returns(normalized.reshape(mask.shape), mask)
        return Batch(traj, advantages, mask, coefficients=coefficients)

    return grpo(low, high)._replace(credit=credit, group_signal=None, reads="steps")
