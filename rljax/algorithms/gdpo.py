"""GDPO: several rewards, normalized one by one (arXiv:2601.05242).

    Z_k = (r_k - mean_group r_k) / (std_group r_k + ε)        A = Σ_k w_k Z_k        Â = (A - mean A) / (std A + ε)

with the last mean and deviation over the rows of the batch. Normalizing the sum instead, as GRPO does, lets completions
with different components share one advantage. With one reward it is GRPO up to the rescaling over the batch. A
component without a score for a row adds 0 to it. The loss is GRPO's. It reads `traj.scores`, not rewards: what
`kl_in_reward` or `overlong_penalty` adds does not reach it. The paper's condition on an easy reward, that a hard one
holds, is applied before, where scores are made.
"""

from collections.abc import Sequence

import jax.numpy as jnp

from rljax.algorithms.common.credit import ValidRows, outcome_batch, outcome_rewards, require
from rljax.algorithms.grpo import grpo
from rljax.ops import groups
from rljax.ops.shapes import PerRow
from rljax.ops.statistics import masked_mean, masked_var
from rljax.types import Algorithm, Trajectory


def gdpo(
    reward_weights: Sequence[float] | None = None, low: float = 0.2, high: float = 0.2, epsilon: float = 1e-6
) -> Algorithm:
    """GRPO on `traj.scores` [B K], each normalized in its group.

    `reward_weights`: one for each score; None: those that the rewards were made with (`traj.reward_weights`). Raises
    ValueError where neither is there.
    """

    def weights_of(traj):
        if reward_weights is None:
            require(traj, "reward_weights")
            return traj.reward_weights
        K = traj.scores.shape[1]
        if len(reward_weights) != K:
            raise ValueError(f"{len(reward_weights)} reward weights for {K} rewards; give one for each")
        return jnp.broadcast_to(jnp.asarray(reward_weights, traj.scores.dtype), traj.scores.shape)

    def scores_differ(traj):
        """Rows of groups that differ in a component with a weight, even where its weighted sum is the same."""
        require(traj, "group", "scores")
        _, valid = outcome_rewards(traj)
        weights = weights_of(traj)
        differs = jnp.zeros_like(valid)
        for k in range(traj.scores.shape[1]):
            score, scored = _component(traj, k, valid)
            differs |= ~groups.zero_std(score, traj.group, scored) & (weights[:, k] != 0)
        return differs

    def credit(traj, coefficients):
        require(traj, "group", "scores")
        _, valid = outcome_rewards(traj)
        weights = weights_of(traj)
        total = jnp.zeros_like(traj.scores[:, 0])
        for k in range(traj.scores.shape[1]):
            score, scored = _component(traj, k, valid)
            total = total + weights[:, k] * groups.standardize(score, traj.group, scored, epsilon)
        std = jnp.sqrt(masked_var(total, valid)) + epsilon
        return outcome_batch(traj, (total - masked_mean(total, valid)) / std, valid, coefficients)

    return grpo(low, high)._replace(credit=credit, group_signal=scores_differ, reads="scores")


def _component(traj: Trajectory, k: int, valid: ValidRows) -> tuple[PerRow, ValidRows]:
    """Score k of each row, 0 where it has none, and which rows have one."""
    scored = valid & jnp.isfinite(traj.scores[:, k])
    return jnp.where(scored, traj.scores[:, k], 0.0), scored
