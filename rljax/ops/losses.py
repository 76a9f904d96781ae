"""Losses of one decision, to be minimized, unreduced. Advantages, returns and old quantities are constants."""

import jax.numpy as jnp
from jax.lax import stop_gradient

from rljax.ops.shapes import Elementwise, Scalar


def policy_gradient(logp: Elementwise, advantages: Elementwise) -> Elementwise:
    """REINFORCE: -Â log π (Williams 1992)."""
    return -stop_gradient(advantages) * logp


def clipped_surrogate(
    ratio: Elementwise, advantages: Elementwise, low: Scalar = 0.2, high: Scalar = 0.2
) -> Elementwise:
    """PPO's clipped surrogate (arXiv:1707.06347, eq. 7): max(-ρÂ, -clip(ρ, 1 - low, 1 + high) Â).

    `high` > `low` is DAPO's clip-higher (arXiv:2503.14476). At ρ = 1 the gradient is that of `policy_gradient`.
    """
    advantages = stop_gradient(advantages)
    return jnp.maximum(-ratio * advantages, -jnp.clip(ratio, 1.0 - low, 1.0 + high) * advantages)


def dual_clip(terms: Elementwise, advantages: Elementwise, bound: float = 3.0) -> Elementwise:
    """min(terms, -c Â) where Â < 0: no gradient for a negative advantage whose ratio exceeds c (arXiv:1912.09729).

    With c > 1 + high it is also the two-sided clip of INTELLECT-2 (arXiv:2505.07291).
    """
    return jnp.where(advantages < 0, jnp.minimum(terms, -bound * stop_gradient(advantages)), terms)


def clipped_fraction(ratio: Elementwise, advantages: Elementwise, low: Scalar = 0.2, high: Scalar = 0.2) -> Elementwise:
    """1 where `clipped_surrogate` passes no gradient: the ratio left the range in the direction that lowers the loss.
    Else 0.
    """
    outside = ((ratio > 1.0 + high) & (advantages > 0)) | ((ratio < 1.0 - low) & (advantages < 0))
    return outside.astype(ratio.dtype)


def clip_metrics(
    ratio: Elementwise, advantages: Elementwise, low: Scalar = 0.2, high: Scalar = 0.2
) -> dict[str, Elementwise]:
    """`clipped_fraction` as metrics: of both bounds, and of each (low where Â < 0, high where Â > 0)."""
    clipped = clipped_fraction(ratio, advantages, low, high)
    return {
        "clip_fraction": clipped,
        "clip_fraction_low": jnp.where(advantages < 0, clipped, 0.0),
        "clip_fraction_high": jnp.where(advantages > 0, clipped, 0.0),
    }


def value_loss(values: Elementwise, returns: Elementwise) -> Elementwise:
    """½ (V - R̂)²."""
    return 0.5 * (values - stop_gradient(returns)) ** 2


def clipped_value_loss(
    values: Elementwise, old_values: Elementwise, returns: Elementwise, clip: float = 0.2
) -> Elementwise:
    """½ max((V - R̂)², (V_old + clip(V - V_old, ±clip) - R̂)²), as in the PPO of Baselines and of RLHF."""
    old_values = stop_gradient(old_values)
    returns = stop_gradient(returns)
    near = old_values + jnp.clip(values - old_values, -clip, clip)
    return 0.5 * jnp.maximum((values - returns) ** 2, (near - returns) ** 2)
