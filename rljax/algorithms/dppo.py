"""DPPO: a trust region on probabilities instead of ratios (arXiv:2602.04879).

    L = -(1/Σm) Σ sg(min(ρ, c)) 1[inside] Â log π

A rare token's ratio leaves PPO's clip range quickly, a common token's hardly ever, however much the policy really
changed. Here a token loses its gradient if the divergence between the two policies at its state, estimated from this
token alone (this token against all others), is above a bound and the update would move it further:

    total variation   p - q <= high where Â > 0,  p - q >= -low else
    binary KL         q log(q/p) + (1 - q) log((1 - q)/(1 - p)) <= high where Â > 0, low else, or the
                      update moves p towards q

p = π, q = π_old. Â is GRPO's.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax.lax import stop_gradient

from rljax.algorithms.common.credit import group_relative, old_policy_logp, rewards_differ
from rljax.ops.ratios import importance_ratio
from rljax.ops.shapes import PerToken, TokenMask
from rljax.ops.weights import token_mean
from rljax.types import Algorithm

TrustRegionFn = Callable[[PerToken, PerToken, TokenMask], TokenMask]  # (logp, old_logp, Â > 0) -> inside


def _dppo(inside: TrustRegionFn, cap: float) -> Algorithm:
    def loss(output, batch):
        logp = stop_gradient(output.logp)
        old_logp = old_policy_logp(batch.traj)
        kept = inside(logp, old_logp, batch.advantages > 0)
        weight = jnp.where(kept, jnp.minimum(importance_ratio(logp, old_logp), cap), 0.0)
        removed = ~kept & (batch.advantages != 0)
        return -weight * batch.advantages * output.logp, {"clip_fraction": removed.astype(weight.dtype)}

    return Algorithm(credit=group_relative(), loss=loss, weights=token_mean, group_signal=rewards_differ, least_group=2)


def dppo_tv(low: float = 0.1, high: float = 0.15, cap: float = 20.0) -> Algorithm:
    """DPPO with the binary total variation."""

    def inside(logp, old_logp, positive):
        change = jnp.exp(logp) - jnp.exp(old_logp)
        return jnp.where(positive, change <= high, change >= -low)

    return _dppo(inside, cap)


def dppo_kl(low: float = 0.03, high: float = 0.05, cap: float = 20.0) -> Algorithm:
    """DPPO with the binary KL, in nats."""

    def inside(logp, old_logp, positive):
        p = jnp.exp(logp)
        q = jnp.exp(old_logp)
        divergence = q * (old_logp - logp) + (1.0 - q) * jnp.log((1.0 - q + 1e-8) / (1.0 - p + 1e-8))
        return jnp.where(positive, (divergence <= high) | (p <= q), (divergence <= low) | (p >= q))

    return _dppo(inside, cap)
