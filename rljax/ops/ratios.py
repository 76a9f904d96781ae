"""Importance ratios between two policies at the same decisions, and the weights made of them.

A *level* says what one ratio is a ratio of: (log ratio, mask, segments) -> log weight [B T]. The product over a
sequence is its exact importance weight; single tokens and the geometric mean are biased and vary less.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rljax.ops.sequences import sequence_mean, sequence_sum

LogProbs = Float[Array, "*shape"]
Terms = Float[Array, "B T"]
Mask = Bool[Array, "B T"]
Segments = Int[Array, "B T"] | None


def bounded_exp(x: LogProbs) -> LogProbs:
    """exp of x clamped to ±20, with no gradient beyond."""
    return jnp.exp(jnp.clip(x, -20.0, 20.0))


def importance_ratio(logp: LogProbs, old_logp: LogProbs) -> LogProbs:
    """ρ = π/π_old = exp(log π - log π_old), the exponent clamped to ±20 (no gradient beyond)."""
    return bounded_exp(logp - old_logp)


def token_level(log_ratio: Terms, mask: Mask, segments: Segments = None) -> Terms:
    """Each decision's own: log ρ_t."""
    return jnp.where(mask, log_ratio, 0.0)


def sequence_product(log_ratio: Terms, mask: Mask, segments: Segments = None) -> Terms:
    """Of the whole sequence, on each of its decisions: Σ_t log ρ_t."""
    return sequence_sum(log_ratio, mask, segments)


def sequence_geometric_mean(log_ratio: Terms, mask: Mask, segments: Segments = None) -> Terms:
    """Length-normalised, on each decision of the sequence: (1/n) Σ_t log ρ_t."""
    return sequence_mean(log_ratio, mask, segments)


def truncate_weights(weights: Terms, cap: float = 2.0) -> Terms:
    """min(w, cap): biased towards the sampling policy, bounded (truncated importance sampling)."""
    return jnp.minimum(weights, cap)


def mask_weights(weights: Terms, low: float = 0.5, high: float = 5.0) -> Terms:
    """w inside [low, high], 0 outside (masked importance sampling; IcePop on single tokens)."""
    return jnp.where((weights >= low) & (weights <= high), weights, 0.0)


def normalize_weights(weights: Terms, mean_weight: Terms) -> Terms:
    """w over its own mean Σ mean_weight · w (self-normalised); `mean_weight` sums to one, as `ops.weights` make it."""
    return weights / jnp.maximum((mean_weight * weights).sum(), 1e-8)
