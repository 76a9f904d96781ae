"""VESPO: a smooth weight of the whole completion's ratio (arXiv:2602.10693).

    L = -(1/Σm) Σ sg(φ(W_i)) Â log π        φ(W) = e^λ W^k e^{-λW}        W_i = Π_t ρ_it

(k, λ) = (2, 3) where Â >= 0 and (3, 2) where Â < 0. φ(1) = 1; completions that became much more or much less likely
fade out without a threshold. log W is kept within [log 1e-8, 20]. Â is GRPO's.
"""

import math

import jax.numpy as jnp
from jax.lax import stop_gradient

from rljax.algorithms.common.credit import group_relative, old_policy_logp, rewards_differ
from rljax.ops.ratios import sequence_product
from rljax.ops.weights import token_mean
from rljax.types import Algorithm


def vespo(positive: tuple[float, float] = (2.0, 3.0), negative: tuple[float, float] = (3.0, 2.0)) -> Algorithm:
    """VESPO. `positive`, `negative`: (k, λ) by the sign of the advantage."""

    def loss(output, batch):
        log_ratio = jnp.clip(output.logp - old_policy_logp(batch.traj), -20.0, 20.0)
        log_w = sequence_product(log_ratio, batch.mask, batch.traj.segments)
        log_w = jnp.clip(log_w, math.log(1e-8), 20.0)
        k = jnp.where(batch.advantages >= 0, positive[0], negative[0])
        lam = jnp.where(batch.advantages >= 0, positive[1], negative[1])
        phi = stop_gradient(jnp.exp(lam + k * log_w - lam * jnp.exp(log_w)))
        return -phi * batch.advantages * output.logp, {"phi": phi}

    return Algorithm(credit=group_relative(), loss=loss, weights=token_mean, group_signal=rewards_differ, least_group=2)
