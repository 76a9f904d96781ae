"""REINFORCE with baselines (Williams 1992).

    L = -(1/N⁺) Σ_i Σ_t (R_i - b_i) log π(a_it | s_it)

A baseline b that does not depend on row i's own decisions leaves the mean of the gradient unchanged and lowers its
variance. `leave_one_out` is such a baseline (RLOO, arXiv:2402.14740); `group_mean` and `batch_mean` contain the row
itself and so shrink the gradient by (n - 1)/n.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rljax.algorithms.credit import episode_rewards, outcome_batch
from rljax.ops import groups, losses, statistics, weights
from rljax.types import Algorithm

Rewards = Float[Array, " B"]
Groups = Int[Array, " B"] | None
Judged = Bool[Array, " B"]


def no_baseline(rewards: Rewards, group: Groups, judged: Judged) -> Rewards:
    """b = 0."""
    return jnp.zeros_like(rewards)


def batch_mean(rewards: Rewards, group: Groups, judged: Judged) -> Rewards:
    """b = mean of all judged rows."""
    return jnp.broadcast_to(statistics.masked_mean(rewards, judged), rewards.shape)


def group_mean(rewards: Rewards, group: Groups, judged: Judged) -> Rewards:
    """b_i = mean of the judged rows of i's group."""
    return groups.group_mean(rewards, group, judged)


def leave_one_out(rewards: Rewards, group: Groups, judged: Judged) -> Rewards:
    """b_i = mean of the *other* judged rows of i's group."""
    return groups.leave_one_out_mean(rewards, group, judged)


def reinforce(baseline: Callable = leave_one_out) -> Algorithm:
    """REINFORCE. `baseline`: (rewards [B], group [B], judged [B]) -> [B]."""

    def credit(traj, coefficients):
        rewards, judged = episode_rewards(traj)
        return outcome_batch(traj, rewards - baseline(rewards, traj.group, judged), judged, coefficients)

    def loss(output, batch):
        return losses.policy_gradient(output.logp, batch.advantages), {}

    return Algorithm(credit=credit, loss=loss, weights=weights.sequence_sum)
