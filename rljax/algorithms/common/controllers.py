"""Coefficients that follow a measurement: (coefficient, measurement, ...) -> coefficient.

Pure functions of scalars, traced or not: a loop keeps their result in `TrainState.coefficients`, where a wrapper
(`with_kl`, `with_entropy`) or a loss reads it, and nothing is recompiled. A measurement of NaN, which is none, leaves a
coefficient as it was.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rljax.ops.shapes import Scalar

Count = int | float | Int[Array, ""] | Float[Array, ""]


def fixed_coefficient(coefficient: Scalar, measured: Scalar) -> Scalar:
    """The coefficient, unchanged."""
    return coefficient


def adaptive_kl(coefficient: Scalar, kl: Scalar, target: Scalar, horizon: Count, samples: Count) -> Float[Array, ""]:
    """β (1 + clip(KL/target - 1, ±0.2) · samples/horizon) (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

    `kl` in the unit of `target`, in the paper nats per *sequence* (the metric `kl_sequence`); `samples`: episodes since
    the last call. The paper starts with β = 0.2, target 6, horizon 10,000.
    """
    kl = jnp.where(jnp.isnan(kl), target, kl)
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return coefficient * (1.0 + error * samples / horizon)


def ppo_penalty_coefficient(coefficient: Scalar, kl: Scalar, target: Scalar) -> Float[Array, ""]:
    """β/2 where KL < target/1.5, 2β where KL > 1.5 target, else β (PPO, arXiv:1707.06347, section 4).

    `kl`: KL(π_old ‖ π) in nats per decision after the updates of one rollout.
    """
    return coefficient * jnp.where(kl > 1.5 * target, 2.0, jnp.where(kl < target / 1.5, 0.5, 1.0))


def adaptive_entropy(
    coefficient: Scalar, entropy: Scalar, target: Scalar, delta: Scalar = 5e-3, low: Scalar = 0.0, high: Scalar = 1.0
) -> Float[Array, ""]:
    """c + Δ where H <= target, else c - Δ, kept within [low, high] (Skywork-OR1, arXiv:2505.22312).

    The loss is given `applied_entropy_coefficient` of it.
    """
    change = jnp.where(entropy <= target, delta, -delta)
    return jnp.clip(coefficient + jnp.where(jnp.isnan(entropy), 0.0, change), low, high)


def applied_entropy_coefficient(coefficient: Scalar, entropy: Scalar, target: Scalar) -> Float[Array, ""]:
    """c where H <= target, else 0: the bonus raises a low entropy and never a high one (arXiv:2505.22312)."""
    return jnp.where(entropy <= target, coefficient, 0.0)
