"""VPG, the vanilla policy gradient with a critic and GAE (arXiv:1506.02438).

    L = token-mean of  -Â log π + c_v ½ (V - R̂)²        Â = whiten(GAE(r, V_old; γ, λ)), R̂ = GAE + V_old

PPO without its ratio: right for one update per rollout.
"""

from rljax.algorithms.ppo import actor_critic
from rljax.ops import losses
from rljax.ops.shapes import Scalar
from rljax.types import Algorithm


def vpg(gamma: Scalar = 1.0, lam: Scalar = 0.95, value_coefficient: float = 0.5) -> Algorithm:
    """Vanilla policy gradient. `value_coefficient` 0: the critic is fitted elsewhere."""

    def actor(output, batch):
        return losses.policy_gradient(output.logp, batch.advantages), {}

    return actor_critic(actor, gamma, lam, value_coefficient, value_clip=None)._replace(one_update=True)
