"""FIPO: tokens weighted by how the policy has changed after them (Future-KL; definition of ms-swift).

    w_t = sg(clip(exp(Σ_{s≥t} γ^{s-t} log ρ_s), 1 - c, 1 + c))        L = (1/Σm) Σ w_t max(-ρÂ, -clip(ρ) Â)

A token whose continuation the policy has made likelier counts more. For bad tokens with a ratio above `safe` the weight
is kept within [0.8, 1]. Â is GRPO's. Gaps are skipped.
"""

import jax.numpy as jnp
from jax.lax import stop_gradient

from rljax.algorithms.common.credit import old_logp, ratio_to_old
from rljax.algorithms.dapo import dapo
from rljax.ops.ratios import bounded_exp
from rljax.ops.returns import discounted_returns
from rljax.ops.sequences import last_decision
from rljax.types import Algorithm


def fipo(low: float = 0.2, high: float = 0.28, gamma=0.97, width: float = 0.2, safe: float = 10.0) -> Algorithm:
    """FIPO. `gamma`: decay per token; `width`: c; `safe`: ratio above which a bad token is not weighed up."""
    plain = dapo(low, high)

    def loss(output, batch):
        log_ratio = stop_gradient(output.logp) - old_logp(batch.traj)
        further = jnp.where(last_decision(batch.mask, batch.traj.segments), 0.0, gamma)
        future = discounted_returns(log_ratio, batch.mask, further)
        weight = jnp.clip(bounded_exp(future), 1.0 - width, 1.0 + width)
        risky = (batch.advantages < 0) & (stop_gradient(ratio_to_old(output, batch)) > safe)
        weight = jnp.where(risky, jnp.clip(weight, 0.8, 1.0), weight)
        terms, metrics = plain.loss(output, batch)
        return weight * terms, {**metrics, "future_kl_weight": weight}

    return plain._replace(loss=loss)
