"""GRPO: group relative policy optimization (DeepSeekMath, arXiv:2402.03300, eq. 3, outcome supervision).

    Â_it = (R_i - mean_group R) / (std_group R + ε)
    L = (1/N⁺) Σ_i (1/n_i) Σ_t max(-ρ_it Â_it, -clip(ρ_it, 1 - low, 1 + high) Â_it)

N⁺ completions have a token to learn from, completion i has n_i of them. ρ is to the policy before the update
(`old_policy_logp`): with one update per rollout ρ = 1, the loss is 0 and the gradient is not. The paper's KL term is a
wrapper: `with_kl(grpo(), 0.04)`. std is unbiased; a group of equal rewards, or of one row, has advantage 0. Process
supervision, the paper's other form, is `grpo_process`.
"""

from rljax.algorithms.common.credit import group_relative, old_policy_logp, rewards_differ
from rljax.ops import losses
from rljax.ops.ratios import importance_ratio
from rljax.ops.weights import seq_mean_token_mean
from rljax.types import Algorithm, WeightsFn


def grpo(
    low: float = 0.2,
    high: float = 0.2,
    std_epsilon: float | None = 1e-6,
    weights: WeightsFn = seq_mean_token_mean,
) -> Algorithm:
    """GRPO. `std_epsilon` None leaves out the division by the group's standard deviation.

    With other weights too that is `dr_grpo`.
    """

    def loss(output, batch):
        ratio = importance_ratio(output.logp, old_policy_logp(batch.traj))
        terms = losses.clipped_surrogate(ratio, batch.advantages, low, high)
        return terms, losses.clip_metrics(ratio, batch.advantages, low, high)

    return Algorithm(group_relative(std_epsilon), loss, weights, group_signal=rewards_differ, least_group=2)
