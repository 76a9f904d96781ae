"""TRPO's surrogate (arXiv:1502.05477, eq. 14), to be minimized by `train.trust_region`.

    L = token-mean of  -ρÂ        subject to  mean KL(π_old ‖ π) <= δ

Nothing is clipped: the bound on the KL is the step's, not the loss's. `trpo` compares completions of a group and needs
no critic; `trpo_gae` uses GAE, with a critic that shares no parameter with the policy and is fitted elsewhere.
"""

from rljax.algorithms.common.credit import old_policy_logp
from rljax.algorithms.ppo import actor_critic
from rljax.algorithms.reinforce import BaselineFn, leave_one_out_baseline, reinforce
from rljax.ops.ratios import importance_ratio
from rljax.ops.shapes import Scalar
from rljax.ops.weights import token_mean
from rljax.types import Algorithm


def _surrogate(output, batch):
    return -importance_ratio(output.logp, old_policy_logp(batch.traj)) * batch.advantages, {}


def trpo(baseline: BaselineFn = leave_one_out_baseline) -> Algorithm:
    """TRPO with the baselines of `reinforce`."""
    return reinforce(baseline)._replace(loss=_surrogate, weights=token_mean)


def trpo_gae(gamma: Scalar = 0.99, lam: Scalar = 0.95) -> Algorithm:
    """TRPO with GAE."""
    surrogate = actor_critic(_surrogate, gamma, lam, value_coefficient=0.0, value_clip=None)
    return surrogate._replace(one_update=True)
