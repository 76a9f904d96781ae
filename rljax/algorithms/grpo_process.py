"""GRPO with process supervision (DeepSeekMath, arXiv:2402.03300, section 4.1.3).

    r̃_j = (r_j - mean) / (std + ε)    over all step rewards of all answers of the group
    Â_it = Σ_{j: step j ends at or after t} r̃_ij

Step rewards stand on the decisions that `step_ends` marks. With one step per answer, ending at its last token, it is
GRPO with outcome supervision. The loss is GRPO's.
"""

import jax.numpy as jnp

from rljax.algorithms.common.credit import decision_rewards, require
from rljax.algorithms.grpo import grpo
from rljax.ops import groups
from rljax.ops.returns import discounted_returns
from rljax.types import Algorithm, Batch


def grpo_process(low: float = 0.2, high: float = 0.2, std_epsilon: float = 1e-6) -> Algorithm:
    """GRPO whose advantages are sums of normalised rewards of this and later steps."""

    def credit(traj, coefficients):
        require(traj, "group", "step_ends")
        rewards, mask = decision_rewards(traj)
        ends = traj.step_ends & mask
        of_steps = jnp.broadcast_to(traj.group[:, None], mask.shape).ravel()
        normal = groups.standardize(rewards.ravel(), of_steps, ends.ravel(), std_epsilon).reshape(mask.shape)
        return Batch(traj, discounted_returns(normal, mask), mask, coefficients=coefficients)

    return grpo(low, high)._replace(credit=credit)
