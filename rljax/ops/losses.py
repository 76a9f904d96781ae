"""Losses of one decision: to be minimised, unreduced. Advantages, returns and old quantities are constants."""

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

Terms = Float[Array, "*shape"]
Scalar = float | Float[Array, ""]


def policy_gradient(logp: Terms, advantages: Terms) -> Terms:
    """REINFORCE: -Â log π (Williams 1992)."""
    return -stop_gradient(advantages) * logp


def clipped_surrogate(ratio: Terms, advantages: Terms, low: Scalar = 0.2, high: Scalar = 0.2) -> Terms:
    """PPO's clipped surrogate (arXiv:1707.06347, eq. 7): max(-ρÂ, -clip(ρ, 1 - low, 1 + high) Â).

    `high` > `low` is DAPO's clip-higher (arXiv:2503.14476). At ρ = 1 the gradient is that of `policy_gradient`.
    """
    advantages = stop_gradient(advantages)
    return jnp.maximum(-ratio * advantages, -jnp.clip(ratio, 1.0 - low, 1.0 + high) * advantages)


def dual_clip(terms: Terms, advantages: Terms, bound: float = 3.0) -> Terms:
    """min(terms, -c Â) where Â < 0: no gradient for a bad decision whose ratio exceeds c (arXiv:1912.09729).

    With c > 1 + high it is also the two-sided clip of INTELLECT-2 (arXiv:2505.07291).
    """
    return jnp.where(advantages < 0, jnp.minimum(terms, -bound * stop_gradient(advantages)), terms)


def clipped_fraction(ratio: Terms, advantages: Terms, low: Scalar = 0.2, high: Scalar = 0.2) -> Terms:
    """1 where `clipped_surrogate` passes no gradient: the ratio left the range on the profitable side. Else 0."""
    outside = ((ratio > 1.0 + high) & (advantages > 0)) | ((ratio < 1.0 - low) & (advantages < 0))
    return outside.astype(ratio.dtype)


def clip_metrics(ratio: Terms, advantages: Terms, low: Scalar = 0.2, high: Scalar = 0.2) -> dict[str, Terms]:
    """`clipped_fraction`, to be logged: in all, and by the bound that was left (low where Â < 0, high where Â > 0)."""
    clipped = clipped_fraction(ratio, advantages, low, high)
    return {
        "clip_fraction": clipped,
        "clip_fraction_low": jnp.where(advantages < 0, clipped, 0.0),
        "clip_fraction_high": jnp.where(advantages > 0, clipped, 0.0),
    }


def value_loss(values: Terms, returns: Terms) -> Terms:
    """½ (V - R̂)²."""
    return 0.5 * (values - stop_gradient(returns)) ** 2


def clipped_value_loss(values: Terms, old_values: Terms, returns: Terms, clip: float = 0.2) -> Terms:
    """½ max((V - R̂)², (V_old + clip(V - V_old, ±clip) - R̂)²), as in the PPO of Baselines and of RLHF."""
    old_values, returns = stop_gradient(old_values), stop_gradient(returns)
    near = old_values + jnp.clip(values - old_values, -clip, clip)
    return 0.5 * jnp.maximum((values - returns) ** 2, (near - returns) ** 2)
