"""FIPO: tokens weighted by how the policy has changed after them (Future-KL; definition of ms-swift).

    w_t = sg(clip(exp(Σ_{s≥t} γ^{s-t} log ρ_s), 1 - c, 1 + c))        L = (1/Σm) Σ w_t max(-ρÂ, -clip(ρ) Â)

A token weighs more if the policy has made its continuation more likely. For tokens with Â < 0 and a ratio above
`safe_ratio` the weight is kept within [0.8, 1]. Â is GRPO's. Gaps are skipped.
"""

import jax.numpy as jnp
from jax.lax import stop_gradient

from rljax.algorithms.common.credit import old_policy_logp
from rljax.algorithms.dapo import dapo
from rljax.ops.ratios import bounded_exp
from rljax.ops.returns import discounted_returns
from rljax.ops.sequences import last_decision
from rljax.types import Algorithm


def fipo(low: float = 0.2, high: float = 0.28, gamma=0.97, width: float = 0.2, safe_ratio: float = 10.0) -> Algorithm:
    """FIPO. `gamma`: decay per token; `width`: c; `safe_ratio`: no weight above 1 for Â < 0 beyond this ratio."""
    clipped_surrogate = dapo(low, high)

    def loss(output, batch):
        log_ratio = stop_gradient(output.logp) - old_policy_logp(batch.traj)
        decay = jnp.where(last_decision(batch.mask, batch.traj.segments), 0.0, gamma)
        future = discounted_returns(log_ratio, batch.mask, decay)
        weight = jnp.clip(bounded_exp(future), 1.0 - width, 1.0 + width)
        unsafe = (batch.advantages < 0) & (bounded_exp(log_ratio) > safe_ratio)
        weight = jnp.where(unsafe, jnp.clip(weight, 0.8, 1.0), weight)
        terms, metrics = clipped_surrogate.loss(output, batch)
        return weight * terms, {**metrics, "future_kl_weight": weight}

    return clipped_surrogate._replace(loss=loss)
