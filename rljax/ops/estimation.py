"""Averages of samples, and what makes them vary less or speak of another distribution.

N samples stand on the last axis; leading axes are free. Samples with mask False take no part, and may hold NaN.
Functions that return samples leave the averaging to `monte_carlo`, which also says how far off it may be.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rljax.ops.returns import Weights

Samples = Float[Array, "*B N"]
Mask = Bool[Array, "*B N"] | None
Means = Float[Array, "*B"]


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: Means
    error: Means


def _kept(x: Samples, mask: Mask) -> Samples:
    return x if mask is None else jnp.where(mask, x, 0.0)


def _count(x: Samples, mask: Mask) -> Means:
    taken = jnp.ones_like(x) if mask is None else mask.astype(x.dtype)
    return taken.sum(axis=-1)


def _mean(x: Samples, mask: Mask) -> Means:
    return _kept(x, mask).sum(axis=-1) / jnp.maximum(_count(x, mask), 1.0)


def _centred(x: Samples, mask: Mask) -> Samples:
    return _kept(x - _mean(x, mask)[..., None], mask)


def monte_carlo(x: Samples, mask: Mask = None) -> Estimate:
    """(1/N) Σ x and its standard error s/√N, s² with ddof 1. Unbiased. Without a sample 0; with one an error of 0."""
    n = _count(x, mask)
    variance = (_centred(x, mask) ** 2).sum(axis=-1) / jnp.maximum(n - 1.0, 1.0)
    return Estimate(_mean(x, mask), jnp.sqrt(variance / jnp.maximum(n, 1.0)))


def control_coefficient(x: Samples, control: Samples, mask: Mask = None) -> Means:
    """c* = Cov(x, g) / Var(g), estimated from the samples; 0 where g does not vary."""
    g = _centred(control, mask)
    variance = (g**2).sum(axis=-1)
    covariance = (_centred(x, mask) * g).sum(axis=-1)
    return jnp.where(variance > 0, covariance / jnp.where(variance > 0, variance, 1.0), 0.0)


def control_variate(
    x: Samples,
    control: Samples,
    expected_control: float | Means,
    coefficient: float | Means | None = None,
    mask: Mask = None,
) -> Samples:
    """x - c (g - E g): samples of the same mean, whose variance at c* is that of x times 1 - corr(x, g)².

    With `coefficient` None it is estimated from these samples, which costs a bias of order 1/N.
    """
    c = control_coefficient(x, control, mask) if coefficient is None else coefficient
    c, expected = (jnp.broadcast_to(jnp.asarray(y, x.dtype), x.shape[:-1]) for y in (c, expected_control))
    return _kept(x - c[..., None] * (_kept(control, mask) - expected[..., None]), mask)


def antithetic(x: Samples, mirrored: Samples) -> Samples:
    """(x + x')/2 of pairs drawn alike but against each other (-z for z of N(0, 1), 1 - u for uniform u).

    Variance ½ Var(x) (1 + corr(x, x')): less than two independent draws where the two are anticorrelated. Average the
    pairs, not their members: s/√N of the members is wrong.
    """
    return 0.5 * (x + mirrored)


def optimal_baseline(squared_scores: Samples, rewards: Samples, mask: Mask = None) -> Means:
    """b* = E[‖s‖² R] / E[‖s‖²], s = ∇ log π: the constant that gives s (R - b) the least variance (Weaver, Tao 2001).

    `squared_scores` ‖s‖², one a sample. Estimated from the samples it is applied to, it costs a bias of order 1/N. 0
    where all scores are 0.
    """
    total = _kept(squared_scores, mask).sum(axis=-1)
    weighted = (_kept(squared_scores, mask) * _kept(rewards, mask)).sum(axis=-1)
    return jnp.where(total > 0, weighted / jnp.where(total > 0, total, 1.0), 0.0)


# ----------------------------------------------------------------------------------------------- importance sampling


def importance_sampling(x: Samples, weights: Samples, mask: Mask = None) -> Estimate:
    """(1/N) Σ w x, w = p/q, of samples drawn from q: unbiased for E_p x; its variance may be infinite."""
    return monte_carlo(_kept(weights, mask) * _kept(x, mask), mask)


def _scaled(weights: Samples, mask: Mask) -> Samples:
    """The weights over the largest of them: what only their proportions decide neither over- nor underflows."""
    w = _kept(weights, mask)
    largest = w.max(axis=-1, keepdims=True)
    return w / jnp.where(largest > 0, largest, 1.0)


def self_normalized(x: Samples, weights: Samples, mask: Mask = None) -> Estimate:
    """Σ w x / Σ w: p and q may lack their constants; a bias of order 1/N, never beyond the samples' own range.

    Error by the delta method: √(Σ w² (x - mean)²) / Σ w. 0 where all weights are 0.
    """
    w = _scaled(weights, mask)
    total = w.sum(axis=-1)
    total = jnp.where(total > 0, total, 1.0)
    mean = (w * _kept(x, mask)).sum(axis=-1) / total
    spread = (w**2 * _kept(x - mean[..., None], mask) ** 2).sum(axis=-1)
    return Estimate(mean, jnp.sqrt(spread) / total)


def truncated_importance_sampling(
    x: Samples, weights: Samples, bound: float | Float[Array, ""], mask: Mask = None
) -> Estimate:
    """(1/N) Σ min(w, c) x: bounded variance, biased towards q (Ionides 2008)."""
    return importance_sampling(x, jnp.minimum(weights, bound), mask)


def trajectory_weights(ratios: Samples, mask: Bool[Array, "*B N"]) -> Means:
    """W = Π_t ρ_t over the decisions of each row: the weight of the whole episode."""
    return jnp.where(mask, ratios, 1.0).prod(axis=-1)


def per_decision(rewards: Samples, ratios: Samples, mask: Bool[Array, "*B N"], gamma: Weights = 1.0) -> Means:
    """Σ_t γ^t (Π_{k<=t} ρ_k) r_t of each row (Precup et al. 2000): unbiased like W · R(τ), without the ratios of
    decisions that came after the reward.
    """
    weights = jnp.cumprod(jnp.where(mask, ratios, 1.0), axis=-1)
    discounts = jnp.cumprod(jnp.where(mask, gamma, 1.0).astype(rewards.dtype), axis=-1)
    discounts = jnp.concatenate([jnp.ones_like(discounts[..., :1]), discounts[..., :-1]], axis=-1)
    return (discounts * weights * jnp.where(mask, rewards, 0.0)).sum(axis=-1)


def effective_sample_size(weights: Samples, mask: Mask = None) -> Means:
    """(Σ w)² / Σ w²: N where all weights are equal, 1 where one has everything (Kish 1965). 0 without a weight."""
    w = _scaled(weights, mask)
    squares = (w**2).sum(axis=-1)
    return jnp.where(squares > 0, w.sum(axis=-1) ** 2 / jnp.where(squares > 0, squares, 1.0), 0.0)


def ess_fraction(weights: Samples, mask: Mask = None) -> Means:
    """Effective sample size over N = 1 / mean((w / mean w)²), in (0, 1]; 0 without a weight."""
    return effective_sample_size(weights, mask) / jnp.maximum(_count(weights, mask), 1.0)
