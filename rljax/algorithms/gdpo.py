"""GDPO: several rewards, normalised one by one (arXiv:2601.05242).

    Z_k = (r_k - mean_group r_k) / (std_group r_k + ε)        A = Σ_k w_k Z_k        Â = (A - mean A) / (std A + ε)

with the last mean and deviation over the rows of the batch. Normalising the sum instead, as GRPO does, lets answers
with different components share one advantage. With one reward it is GRPO up to the rescaling over the batch. A
component that could not judge a row adds 0 to it. The loss is GRPO's. It reads
`traj.scores`, not rewards: what `kl_in_reward` or `overlong_penalty` adds does not reach it. Left out: conditioning an
easy reward on a hard one.
"""

from collections.abc import Sequence

import jax.numpy as jnp

from rljax.algorithms.common.credit import outcome_batch, outcome_rewards, require
from rljax.algorithms.grpo import grpo
from rljax.ops import groups
from rljax.ops.statistics import masked_mean, masked_var
from rljax.types import Algorithm


def gdpo(
    reward_weights: Sequence[float] | None = None, low: float = 0.2, high: float = 0.2, epsilon: float = 1e-6
) -> Algorithm:
    """GRPO on `traj.scores` [B K], each normalised in its group. `reward_weights`: one for each; None: all 1."""

    def credit(traj, coefficients):
        require(traj, "group", "scores")
        _, valid = outcome_rewards(traj)
        scores, total = traj.scores, jnp.zeros_like(traj.scores[:, 0])
        factors = [1.0] * scores.shape[1] if reward_weights is None else reward_weights
        if len(factors) != scores.shape[1]:
            raise ValueError(f"{len(factors)} reward weights for {scores.shape[1]} rewards; give one for each")
        for k, factor in enumerate(factors):
            valid = valid & jnp.isfinite(scores[:, k])
            score = jnp.where(valid, scores[:, k], 0.0)
            total = total + factor * groups.standardize(score, traj.group, valid, epsilon)
        spread = jnp.sqrt(masked_var(total, valid)) + epsilon
        return outcome_batch(traj, (total - masked_mean(total, valid)) / spread, valid, coefficients)

    return grpo(low, high)._replace(credit=credit)
