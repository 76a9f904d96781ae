"""Clip-Cov and KL-Cov: keep the entropy by holding back the few tokens that eat it (arXiv:2505.22617).

    cov_t = (Â_t - mean Â)(log π_t - mean log π)        over the whole optimizer batch
    clip_cov  L = token mean of  0 where dropped, max(-ρÂ, -clip(ρ) Â) else
    kl_cov    L = token mean of  -ρÂ + coefficient · |log π - log π_old| where held, -ρÂ else

The entropy falls with the covariance of advantage and log-prob, and a few tokens carry most of it. `clip_cov` drops
max(1, ⌊share · N⌋) random ones of those whose cov lies within `bounds`, unless the clip already did; `kl_cov` holds as
many with the highest cov, and clips nothing. Which tokens is decided in `prepare`, over the whole batch, before it is
cut. Â is GRPO's.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rljax.algorithms.common.credit import group_relative, old_logp, ratio_to_old
from rljax.algorithms.dapo import dapo
from rljax.ops import losses
from rljax.ops.kl import absolute
from rljax.ops.statistics import masked_mean
from rljax.ops.weights import token_mean
from rljax.types import Algorithm, Batch, PolicyOutput


def _covariance(output: PolicyOutput, batch: Batch):
    def centered(x):
        return x - masked_mean(x, batch.mask)

    return centered(batch.advantages) * centered(output.logp)


def _count(share: float, mask):
    return jnp.maximum(jnp.floor(share * mask.sum()), 1.0)


def _highest(score, among, count):
    """The `count` places of `among` with the highest score, in the order of the flattened array where scores tie."""
    order = jnp.argsort(jnp.where(among, -score, jnp.inf).ravel(), stable=True)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.size))
    return among & (rank.reshape(among.shape) < count)


def clip_cov(
    low: float = 0.2,
    high: float = 0.2,
    share: float = 2e-4,
    bounds: tuple[float, float] = (1.0, 5.0),
    draw: Callable = jax.random.uniform,
) -> Algorithm:
    """Clip-Cov. `draw`: (key, shape) -> scores, of which the highest candidates are taken."""
    plain = dapo(low, high)

    def prepare(output, batch, key):
        clipped = losses.clipped_fraction(ratio_to_old(output, batch), batch.advantages, low, high) > 0
        covariance = _covariance(output, batch)
        candidates = batch.mask & ~clipped & (covariance > bounds[0]) & (covariance < bounds[1])
        dropped = _highest(draw(key, batch.mask.shape), candidates, _count(share, batch.mask))
        return batch.replace(extra={**batch.extra, "dropped": dropped})

    def loss(output, batch):
        terms, metrics = plain.loss(output, batch)
        dropped = batch.extra["dropped"]
        return jnp.where(dropped, 0.0, terms), {**metrics, "dropped": dropped.astype(terms.dtype)}

    return plain._replace(prepare=prepare, loss=loss)


def kl_cov(share: float = 2e-4, coefficient: float = 1.0) -> Algorithm:
    """KL-Cov."""

    def prepare(output, batch, key):
        held = _highest(_covariance(output, batch), batch.mask, _count(share, batch.mask))
        return batch.replace(extra={**batch.extra, "held": held})

    def loss(output, batch):
        penalty = jnp.where(batch.extra["held"], absolute(output.logp, old_logp(batch.traj)), 0.0)
        return -ratio_to_old(output, batch) * batch.advantages + coefficient * penalty, {"old_policy_penalty": penalty}

    return Algorithm(credit=group_relative(), loss=loss, weights=token_mean, prepare=prepare)
