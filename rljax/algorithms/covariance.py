"""Clip-Cov and KL-Cov: keep the entropy up by restraining the few tokens that reduce it most (arXiv:2505.22617).

    cov_t = (Â_t - mean Â)(log π_t - mean log π)        over the whole optimizer batch
    clip_cov  L = token mean of  0 where dropped, max(-ρÂ, -clip(ρ) Â) else
    kl_cov    L = token mean of  -ρÂ + coefficient · |log π - log π_old| where held, -ρÂ else

The entropy falls with the covariance of advantage and log-prob, and a few tokens carry most of it. `clip_cov` drops
max(1, ⌊share · N⌋) random ones of those whose cov lies within `bounds`, unless the clip already did; `kl_cov` holds as
many with the highest cov, and clips nothing. The tokens are selected in `prepare`, over the whole batch, before it is
split. Â is GRPO's.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from rljax.algorithms.common.credit import group_relative, old_policy_logp, rewards_differ
from rljax.algorithms.dapo import dapo
from rljax.ops import losses
from rljax.ops.kl import absolute
from rljax.ops.ratios import importance_ratio
from rljax.ops.shapes import PerToken, TokenMask
from rljax.ops.statistics import masked_mean
from rljax.ops.weights import token_mean
from rljax.types import Algorithm, Batch, PolicyOutput


def _covariance(output: PolicyOutput, batch: Batch) -> PerToken:
    def center(x):
        return x - masked_mean(x, batch.mask)

    return center(batch.advantages) * center(output.logp)


def _count(share: float, mask: TokenMask) -> Float[Array, ""]:
    return jnp.maximum(jnp.floor(share * mask.sum()), 1.0)


def _highest(score: PerToken, candidates: TokenMask, count: Float[Array, ""]) -> TokenMask:
    """The `count` candidates with the highest score, in the order of the flattened array where scores are equal."""
    order = jnp.argsort(jnp.where(candidates, -score, jnp.inf).ravel(), stable=True)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.size))
    return candidates & (rank.reshape(candidates.shape) < count)


def clip_cov(
    low: float = 0.2,
    high: float = 0.2,
    share: float = 2e-4,
    bounds: tuple[float, float] = (1.0, 5.0),
    draw: Callable[[Key[Array, ""], tuple[int, ...]], PerToken] = jax.random.uniform,
) -> Algorithm:
    """Clip-Cov. `draw`: (key, shape) -> scores; the candidates with the highest ones are dropped."""
    clipped_surrogate = dapo(low, high)

    def prepare(output, batch, key):
        ratio = importance_ratio(output.logp, old_policy_logp(batch.traj))
        clipped = losses.clipped_fraction(ratio, batch.advantages, low, high) > 0
        covariance = _covariance(output, batch)
        candidates = batch.mask & ~clipped & (covariance > bounds[0]) & (covariance < bounds[1])
        dropped = _highest(draw(key, batch.mask.shape), candidates, _count(share, batch.mask))
        return batch.replace(extra={**batch.extra, "dropped": dropped})

    def loss(output, batch):
        terms, metrics = clipped_surrogate.loss(output, batch)
        dropped = batch.extra["dropped"].astype(terms.dtype)
        removed = jnp.where(batch.advantages != 0, jnp.maximum(metrics["clip_fraction"], dropped), 0.0)
        return (1.0 - dropped) * terms, {**metrics, "clip_fraction": removed, "dropped": dropped}

    return clipped_surrogate._replace(prepare=prepare, loss=loss)


def kl_cov(share: float = 2e-4, coefficient: float = 1.0) -> Algorithm:
    """KL-Cov."""

    def prepare(output, batch, key):
        held = _highest(_covariance(output, batch), batch.mask, _count(share, batch.mask))
        return batch.replace(extra={**batch.extra, "held": held})

    def loss(output, batch):
        old_logp = old_policy_logp(batch.traj)
        penalty = jnp.where(batch.extra["held"], absolute(output.logp, old_logp), 0.0)
        terms = -importance_ratio(output.logp, old_logp) * batch.advantages + coefficient * penalty
        return terms, {"old_policy_penalty": penalty}

    return Algorithm(
        credit=group_relative(),
        loss=loss,
        weights=token_mean,
        prepare=prepare,
        group_signal=rewards_differ,
        least_group=2,
    )
