"""The optimal token baseline: one baseline per column of a group, weighted by accumulated score norms.

    W_it = Σ_{s≤t} (1 - 2 π(a_is) + Σ_v π(v)²)        Â_it = G_it - Σ_j W_jt G_jt / Σ_j W_jt
    L = -(1/N⁺) Σ_i Σ_t Â_it log π

1 - 2π + Σπ² is the squared norm of the gradient of log π by the logits, so W estimates the squared score of the
completion up to t: the baseline that minimizes the variance (Greensmith et al. 2004), column by column. G is the
reward-to-go. Rows of a group must start in the same column. A row alone in a column of its group has no baseline there.
W is that of the policy that sampled: of samples of another one the baseline is not the optimal one.
"""

import jax.numpy as jnp

from rljax.algorithms.common.credit import decision_rewards, require
from rljax.algorithms.reinforce import reinforce
from rljax.ops import groups
from rljax.ops.returns import discounted_returns
from rljax.types import Algorithm, Batch


def otb() -> Algorithm:
    """REINFORCE with the optimal token baseline."""

    def credit(traj, coefficients):
        require(traj, "group", "old_logp", "sum_pi_squared")
        rewards, mask = decision_rewards(traj)
        returns = discounted_returns(rewards, mask)
        norm = jnp.where(mask, 1.0 - 2.0 * jnp.exp(traj.old_logp) + traj.sum_pi_squared, 0.0)
        weight = jnp.where(mask, jnp.cumsum(norm, axis=1), 0.0)
        total = groups.group_sum(weight, traj.group)
        baseline = groups.group_sum(weight * returns, traj.group) / jnp.where(total > 0, total, 1.0)
        alone = groups.group_sum(mask.astype(returns.dtype), traj.group) < 2
        advantages = jnp.where(mask, returns - jnp.where(alone, 0.0, baseline), 0.0)
        return Batch(traj, advantages, mask, returns=returns, coefficients=coefficients)

    return reinforce()._replace(credit=credit, needs=("old_logp", "sum_pi_squared"), off_policy="never")
