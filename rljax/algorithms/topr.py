"""TOPR: tapered off-policy REINFORCE (arXiv:2503.14286).

    L = -(1/N⁺) Σ_i sg(w_i) Â_i Σ_t log π        w_i = 1 where Â_i >= 0, min(Π_t π/μ, 1) where Â_i < 0

Good completions are imitated, as in supervised learning, however unlikely they are by now; a bad one is weighted by its
truncated importance ratio, so that it no longer pushes once the policy has left it. μ is the behavior policy
(`traj.logp`). The paper's rewards are -1 and 1, less a baseline that is a constant; with rewards of 0 and 1 and no
baseline only the good completions are learned from.
"""

import jax.numpy as jnp
from jax.lax import stop_gradient

from rljax.algorithms.reinforce import BaselineFn, no_baseline, reinforce
from rljax.ops import losses
from rljax.ops.ratios import bounded_exp, sequence_product, truncate_weights
from rljax.types import Algorithm


def topr(baseline: BaselineFn = no_baseline) -> Algorithm:
    """TOPR. `baseline`: (rewards [B], group [B], valid [B]) -> [B]."""

    def loss(output, batch):
        log_ratio = stop_gradient(output.logp) - batch.traj.logp
        ratio = bounded_exp(sequence_product(log_ratio, batch.mask, batch.traj.segments))
        weight = jnp.where(batch.advantages < 0, truncate_weights(ratio, 1.0), 1.0)
        return losses.policy_gradient(output.logp, weight * batch.advantages), {"importance": weight}

    return reinforce(baseline)._replace(loss=loss, one_update=False, off_policy="itself")
