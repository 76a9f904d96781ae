"""DRO: policy gradient with a quadratic pull towards the old policy, no clip (arXiv:2405.19107, as verl reads it).

    L = -(1/Σm) Σ (Â log π - ½ β (log π - log π_old)²)

Left out: the paper's learnt value function, for which GRPO's group mean stands.
"""

from rljax.algorithms.common.credit import group_relative, old_logp
from rljax.ops import losses
from rljax.ops.kl import k2
from rljax.ops.weights import token_mean
from rljax.types import Algorithm


def dro(beta: float = 0.1) -> Algorithm:
    """DRO."""

    def loss(output, batch):
        penalty = k2(output.logp, old_logp(batch.traj))
        return losses.policy_gradient(output.logp, batch.advantages) + beta * penalty, {"old_policy_penalty": penalty}

    return Algorithm(credit=group_relative(), loss=loss, weights=token_mean)
