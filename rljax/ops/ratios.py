"""Importance ratios between two policies at the same decisions, and weights computed from them.

A *level* says whether a ratio is of a token or of a sequence: (log ratio, mask, segments) -> log weight [B T]. The
product over a sequence is its exact importance weight; token ratios and geometric means are biased with less variance.
"""

from collections.abc import Callable

import jax.numpy as jnp

from rljax.ops.sequences import sequence_mean, sequence_sum
from rljax.ops.shapes import Elementwise, PerToken, Segments, TokenMask

RatioLevel = Callable[[PerToken, TokenMask, Segments], PerToken]  # (log ratio, mask, segments) -> log weight


def bounded_exp(x: Elementwise) -> Elementwise:
    """exp of x clamped to ±20 (no gradient beyond): `importance_ratio` of a log ratio."""
    return jnp.exp(jnp.clip(x, -20.0, 20.0))


def importance_ratio(logp: Elementwise, old_logp: Elementwise) -> Elementwise:
    """ρ = π/π_old = exp(log π - log π_old), the exponent clamped to ±20 (no gradient beyond)."""
    return bounded_exp(logp - old_logp)


def token_level(log_ratio: PerToken, mask: TokenMask, segments: Segments = None) -> PerToken:
    """log ρ_t of each decision."""
    return jnp.where(mask, log_ratio, 0.0)


def sequence_product(log_ratio: PerToken, mask: TokenMask, segments: Segments = None) -> PerToken:
    """Σ_t log ρ_t of the sequence, on each of its decisions."""
    return sequence_sum(log_ratio, mask, segments)


def sequence_geometric_mean(log_ratio: PerToken, mask: TokenMask, segments: Segments = None) -> PerToken:
    """(1/n) Σ_t log ρ_t of the sequence, on each of its decisions."""
    return sequence_mean(log_ratio, mask, segments)


def truncate_weights(weights: PerToken, cap: float = 2.0) -> PerToken:
    """min(w, cap): biased towards the sampling policy, bounded (truncated importance sampling)."""
    return jnp.minimum(weights, cap)


def mask_weights(weights: PerToken, low: float = 0.5, high: float = 5.0) -> PerToken:
    """w inside [low, high], 0 outside (masked importance sampling; IcePop on single tokens)."""
    return jnp.where((weights >= low) & (weights <= high), weights, 0.0)


def normalize_weights(weights: PerToken, mean_weight: PerToken) -> PerToken:
    """w divided by its mean Σ m w / Σ m (self-normalized), m = `mean_weight`: any of `ops.weights`."""
    mean = (mean_weight * weights).sum() / jnp.maximum(mean_weight.sum(), 1e-8)
    return weights / jnp.maximum(mean, 1e-8)
