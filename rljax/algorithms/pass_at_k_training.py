"""Pass@k training: advantages of completions in random subsets of k of their group (arXiv:2508.10751, eq. 14 and 15).

    R̄ = 1 - C(N_neg, k)/C(N, k)        σ = sqrt(R̄ (1 - R̄))
    Â = (1 - R̄)/σ for the correct,  (1 - R̄ - C(N_neg - 1, k - 1)/C(N - 1, k - 1))/σ for the incorrect completions

N completions of a prompt, N_neg of them incorrect. A subset has the reward of its best completion; R̄ and σ are mean and
standard deviation over all subsets, Â_i is the mean of (R - R̄)/σ over the subsets with i in them. k = 1 is GRPO's
advantage with the biased standard deviation. The loss is GRPO's. A completion is correct if its first score is above
`above` (`correct_rows`). For k = N, where all subsets are one, Â is 0: `grpo_pass_at_k` has a signal there.
"""

import jax.numpy as jnp

from rljax.algorithms.common.credit import correct_rows, outcome_batch, require
from rljax.algorithms.grpo import grpo
from rljax.ops import groups
from rljax.ops.pass_at_k import pass_at_k
from rljax.types import Algorithm


def pass_at_k_training(k: int = 4, low: float = 0.2, high: float = 0.2, above: float = 0.0) -> Algorithm:
    """GRPO that climbs pass@k. A group of at most k valid rows has advantage 0."""

    def signal(traj):
        require(traj, "group")
        correct, valid = correct_rows(traj, above)
        enough = groups.group_count(traj.group, valid) > k
        return enough & ~groups.zero_std(correct.astype(float), traj.group, valid)

    def credit(traj, coefficients):
        require(traj, "group")
        group = traj.group
        correct, valid = correct_rows(traj, above)
        count = groups.group_count(group, valid)
        correct_count = groups.group_count(group, correct)
        mean = jnp.where(count >= k, pass_at_k(count, correct_count, k), 0.0)
        all_wrong = 1.0 - pass_at_k(count - 1.0, correct_count, k - 1)  # subsets with a given incorrect completion
        std = jnp.sqrt(mean * (1.0 - mean))
        differ = std > 0
        gain = 1.0 - mean - jnp.where(correct, 0.0, all_wrong)
        advantages = jnp.where(differ, gain / jnp.where(differ, std, 1.0), 0.0).astype(traj.rewards.dtype)
        return outcome_batch(traj, advantages, valid, coefficients)

    return grpo(low, high)._replace(credit=credit, group_signal=signal, least_group=k + 1, reads="correct")
