"""RLOO: REINFORCE with the leave-one-out baseline (arXiv:2402.14740).

    Â_i = R_i - mean_{j≠i} R_j        L = (1/N⁺) Σ_i max(-W_i Â_i, -clip(W_i, 1 - low, 1 + high) Â_i)

W_i = Π_t ρ_it is the ratio of the whole completion, not divided by its length: in the first update after a rollout W =
1 and the gradient is REINFORCE's, unbiased. The paper has no clip; it matters only if a rollout is learned from more
than once. Its KL is in the reward: `kl_in_reward(rloo(), 0.05)`. A row alone in its group keeps its reward.
"""

from rljax.algorithms.common.credit import from_rewards, old_policy_logp, rewards_differ
from rljax.algorithms.reinforce import leave_one_out_baseline
from rljax.ops import losses
from rljax.ops.ratios import bounded_exp, sequence_product
from rljax.ops.weights import seq_mean_token_mean
from rljax.types import Algorithm


def rloo(low: float = 0.2, high: float = 0.2) -> Algorithm:
    """RLOO, with a clip of the completion's ratio."""

    def advantage(rewards, group, valid):
        return rewards - leave_one_out_baseline(rewards, group, valid)

    def loss(output, batch):
        log_ratio = output.logp - old_policy_logp(batch.traj)
        ratio = bounded_exp(sequence_product(log_ratio, batch.mask, batch.traj.segments))
        terms = losses.clipped_surrogate(ratio, batch.advantages, low, high)
        return terms, losses.clip_metrics(ratio, batch.advantages, low, high)

    credit = from_rewards(advantage, "group")
    return Algorithm(credit, loss, weights=seq_mean_token_mean, group_signal=rewards_differ, least_group=2)
