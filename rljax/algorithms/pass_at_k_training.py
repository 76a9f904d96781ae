"""Pass@k training: advantages of completions in random subsets of k of their group (arXiv:2508.10751, eq. 14 and 15).

    R̄ = 1 - C(N_neg, k)/C(N, k)        σ = sqrt(R̄ (1 - R̄))
    Â = (1 - R̄)/σ for the correct,  (1 - R̄ - C(N_neg - 1, k - 1)/C(N - 1, k - 1))/σ for the incorrect completions

N completions of a prompt, N_neg of them incorrect. A subset has the reward of its best completion; R̄ and σ are mean and
standard deviation over all subsets, Â_i is the mean of (R - R̄)/σ over the subsets with i in them. k = 1 is GRPO's
advantage with the biased standard deviation. The loss is GRPO's. For k = N, where all subsets are one, Â is 0:
`grpo_pass_at_k` has a signal there.
"""

import jax.numpy as jnp

from rljax.algorithms.common.credit import from_rewards
from rljax.algorithms.grpo import grpo
from rljax.ops import groups
from rljax.ops.pass_at_k import pass_at_k
from rljax.types import Algorithm


def pass_at_k_training(k: int = 4, low: float = 0.2, high: float = 0.2, above: float = 0.0) -> Algorithm:
    """GRPO that climbs pass@k. A completion is correct if its reward is above `above`; a group of fewer than k valid
    rows has advantage 0.
    """

    def advantage(rewards, group, valid):
        correct = valid & (rewards > above)
        count = groups.group_count(group, valid)
        correct_count = groups.group_count(group, correct)
        mean = jnp.where(count >= k, pass_at_k(count, correct_count, k), 0.0)
        all_wrong = 1.0 - pass_at_k(count - 1.0, correct_count, k - 1)  # subsets with a given incorrect completion
        std = jnp.sqrt(mean * (1.0 - mean))
        signal = (std > 0) & valid
        gain = 1.0 - mean - jnp.where(correct, 0.0, all_wrong)
        return jnp.where(signal, gain / jnp.where(signal, std, 1.0), 0.0)

    return grpo(low, high)._replace(credit=from_rewards(advantage, "group"))
