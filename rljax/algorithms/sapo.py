"""SAPO: a soft gate instead of a clip (arXiv:2511.20347).

    L = -(1/N⁺) Σ_i (1/n_i) Σ_t (4/τ) σ(τ (ρ - 1)) Â        τ = positive where Â > 0, negative else

At ρ = 1 the gradient is that of the policy gradient; on both sides the derivative by ρ fades like sech²(τ (ρ - 1)/2).
The higher temperature for Â < 0 makes it fade faster there. The value at ρ = 1 is 2Â/τ, not Â. Â is GRPO's.
"""

import jax
import jax.numpy as jnp

from rljax.algorithms.common.credit import group_relative, old_policy_logp, rewards_differ
from rljax.ops.ratios import importance_ratio
from rljax.ops.weights import seq_mean_token_mean
from rljax.types import Algorithm


def sapo(positive: float = 1.0, negative: float = 1.05) -> Algorithm:
    """SAPO. `positive`, `negative`: the gate's temperatures τ by the sign of the advantage."""

    def loss(output, batch):
        ratio = importance_ratio(output.logp, old_policy_logp(batch.traj))
        tau = jnp.where(batch.advantages > 0, positive, negative)
        gate = 4.0 / tau * jax.nn.sigmoid(tau * (ratio - 1.0))
        return -gate * batch.advantages, {}

    return Algorithm(
        credit=group_relative(), loss=loss, weights=seq_mean_token_mean, group_signal=rewards_differ, least_group=2
    )
