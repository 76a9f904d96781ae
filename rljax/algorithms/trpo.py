"""TRPO's surrogate (arXiv:1502.05477, eq. 14), to be minimised by `train.trust_region`.

    L = token-mean of  -ρÂ        subject to  mean KL(π_old ‖ π) <= δ

Nothing is clipped: the bound on the KL is the step's, not the loss's. `trpo` compares answers of a group and needs no
critic; `trpo_gae` takes GAE, whose critic shares no parameter with the policy and is fitted elsewhere.
"""

from collections.abc import Callable

from rljax.algorithms.common.credit import ratio_to_old
from rljax.algorithms.ppo import actor_critic
from rljax.algorithms.reinforce import leave_one_out_baseline, reinforce
from rljax.ops.weights import token_mean
from rljax.types import Algorithm, Scalar


def _surrogate(output, batch):
    return -ratio_to_old(output, batch) * batch.advantages, {}


def trpo(baseline: Callable = leave_one_out_baseline) -> Algorithm:
    """TRPO with the baselines of `reinforce`."""
    return reinforce(baseline)._replace(loss=_surrogate, weights=token_mean)


def trpo_gae(gamma: Scalar = 0.99, lam: Scalar = 0.95) -> Algorithm:
    """TRPO with GAE."""
    return actor_critic(_surrogate, gamma, lam, value_coefficient=0.0, value_clip=None)
