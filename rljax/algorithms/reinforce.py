"""REINFORCE with baselines (Williams 1992).

    reinforce          L = -(1/N⁺) Σ_i Σ_t (R_i - b_i) log π(a_it | s_it)
    reinforce_to_go    L = -(1/N⁺) Σ_i Σ_t (G_it - b_it) log π(a_it | s_it)        G_it = Σ_{t'≥t} γ^{t'-t} r_it'

A baseline b that does not depend on row i's own decisions leaves the mean of the gradient unchanged and lowers its
variance. `leave_one_out_baseline` is one (RLOO, arXiv:2402.14740); `group_mean_baseline` and `batch_mean_baseline`
include the row itself and so shrink the gradient by (n - 1)/n. b_it is the same function of column t: n are then the
rows with a decision there, and where n varies with t the two that include the row also change the gradient's direction.
A row is one episode, and a truncated one counts as ended: neither bootstraps.
"""

import jax
import jax.numpy as jnp

from rljax.algorithms.common.credit import (
    AdvantageFn,
    GroupIds,
    ValidRows,
    decision_rewards,
    outcome_batch,
    outcome_rewards,
    require,
    rewards_differ,
)
from rljax.ops import groups, losses, statistics, weights
from rljax.ops.returns import discounted_returns
from rljax.ops.shapes import PerRow, Scalar
from rljax.types import Algorithm, Batch

BaselineFn = AdvantageFn  # (rewards [B], group [B], valid [B]) -> b [B]


def no_baseline(rewards: PerRow, group: GroupIds, valid: ValidRows) -> PerRow:
    """b = 0."""
    return jnp.zeros_like(rewards)


def batch_mean_baseline(rewards: PerRow, group: GroupIds, valid: ValidRows) -> PerRow:
    """b = mean of all valid rows."""
    return jnp.broadcast_to(statistics.masked_mean(rewards, valid), rewards.shape)


def group_mean_baseline(rewards: PerRow, group: GroupIds, valid: ValidRows) -> PerRow:
    """b_i = mean of the valid rows of i's group."""
    return groups.group_mean(rewards, group, valid)


def leave_one_out_baseline(rewards: PerRow, group: GroupIds, valid: ValidRows) -> PerRow:
    """b_i = mean of the *other* valid rows of i's group."""
    return groups.leave_one_out_mean(rewards, group, valid)


def _compares(baseline: BaselineFn) -> bool:
    return baseline in (group_mean_baseline, leave_one_out_baseline)


def reinforce(baseline: BaselineFn = leave_one_out_baseline) -> Algorithm:
    """REINFORCE. `baseline`: (rewards [B], group [B], valid [B]) -> [B]."""
    compares = _compares(baseline)

    def credit(traj, coefficients):
        if compares:
            require(traj, "group")
        rewards, valid = outcome_rewards(traj)
        return outcome_batch(traj, rewards - baseline(rewards, traj.group, valid), valid, coefficients)

    def loss(output, batch):
        return losses.policy_gradient(output.logp, batch.advantages), {}

    signal = rewards_differ if compares else None
    least = 2 if compares else 1
    weigh = weights.seq_mean_token_sum
    return Algorithm(credit, loss, weigh, group_signal=signal, least_group=least, one_update=True)


def reinforce_to_go(baseline: BaselineFn = leave_one_out_baseline, gamma: Scalar = 1.0) -> Algorithm:
    """REINFORCE in which a decision is credited with the rewards from it on. `baseline`: as of `reinforce`."""

    def credit(traj, coefficients):
        if _compares(baseline):
            require(traj, "group")
        rewards, mask = decision_rewards(traj)
        returns = discounted_returns(rewards, mask, gamma)
        baselines = jax.vmap(baseline, in_axes=(1, None, 1), out_axes=1)(returns, traj.group, mask)
        advantages = jnp.where(mask, returns - baselines, 0.0)
        return Batch(traj, advantages, mask, returns=returns, coefficients=coefficients)

    return reinforce(baseline)._replace(credit=credit, group_signal=None)
