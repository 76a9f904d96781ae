"""Losses of one decision, to be minimized, unreduced. Advantages, returns and old quantities are constants."""

from functools import reduce

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


def clipped_fraction(
    ratio: Elementwise,
    advantages: Elementwise,
    low: Scalar = 0.2,
    high: Scalar = 0.2,
    dual: float | None = None,
) -> Elementwise:
    """1 where the clips remove the gradient of a decision, else 0: `clipped_surrogate`'s where the ratio left the range
    in the direction that lowers the loss, and with `dual` `dual_clip`'s, whose bound it is.
    """
    return clip_metrics(ratio, advantages, low, high, dual)["clip_fraction"]


def clip_metrics(
    ratio: Elementwise,
    advantages: Elementwise,
    low: Scalar = 0.2,
    high: Scalar = 0.2,
    dual: float | None = None,
) -> dict[str, Elementwise]:
    """`clip_fraction`, 1 where the clips remove the gradient of a decision, and its parts: below the range with Â < 0,
    above it with Â > 0, and with `dual` above that bound with Â < 0. The clamp of a ratio's exponent is not counted.
    """
    outside = {
        "clip_fraction_low": (ratio < 1.0 - low) & (advantages < 0),
        "clip_fraction_high": (ratio > 1.0 + high) & (advantages > 0),
    }
    if dual is not None:
        outside["clip_fraction_dual"] = (ratio > dual) & (advantages < 0)
    parts = {name: part.astype(ratio.dtype) for name, part in outside.items()}
    return {"clip_fraction": reduce(jnp.maximum, parts.values()), **parts}


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
