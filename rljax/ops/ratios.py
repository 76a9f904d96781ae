"""Importance ratios between two policies at the same decisions."""

import jax.numpy as jnp
from jaxtyping import Array, Float

LogProbs = Float[Array, "*shape"]


def importance_ratio(logp: LogProbs, old_logp: LogProbs) -> LogProbs:
    """ρ = π/π_old = exp(log π - log π_old), the exponent clamped to ±20 (no gradient beyond)."""
    return jnp.exp(jnp.clip(logp - old_logp, -20.0, 20.0))
