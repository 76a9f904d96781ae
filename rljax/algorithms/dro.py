"""DRO: policy gradient with a quadratic penalty on the distance to the old policy, no clip (arXiv:2405.19107).

    L = -(1/Σm) Σ (Â log π - ½ β (log π - log π_old)²)

Left out: the paper's learned value function, replaced by GRPO's group mean, as in verl.
"""

from rljax.algorithms.common.credit import group_relative, old_policy_logp, rewards_differ
from rljax.ops import losses
from rljax.ops.kl import k2
from rljax.ops.weights import token_mean
from rljax.types import Algorithm


def dro(beta: float = 0.1) -> Algorithm:
    """DRO."""

    def loss(output, batch):
        penalty = k2(output.logp, old_policy_logp(batch.traj))
        terms = losses.policy_gradient(output.logp, batch.advantages) + beta * penalty
        return terms, {"old_policy_penalty": penalty}

    return Algorithm(credit=group_relative(), loss=loss, weights=token_mean, group_signal=rewards_differ, least_group=2)
