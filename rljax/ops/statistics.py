"""Means and spreads under a mask. Masked entries may be NaN. Statistics are over all axes."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Values = Float[Array, "*shape"]
Mask = Bool[Array, "*shape"]
Scalar = Float[Array, ""]


def masked_mean(x: Values, mask: Mask) -> Scalar:
    """Mean of the unmasked entries; 0 where there is none."""
    return jnp.where(mask, x, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def masked_var(x: Values, mask: Mask) -> Scalar:
    """Unbiased variance (ddof 1) of the unmasked entries; 0 for fewer than two."""
    centered = jnp.where(mask, x - masked_mean(x, mask), 0.0)
    return (centered**2).sum() / jnp.maximum(mask.sum() - 1, 1)


def masked_std(x: Values, mask: Mask) -> Scalar:
    """Square root of `masked_var`."""
    return jnp.sqrt(masked_var(x, mask))


def masked_max(x: Values, mask: Mask) -> Scalar:
    """Largest unmasked entry; 0 where there is none."""
    return jnp.where(mask.any(), jnp.where(mask, x, -jnp.inf).max(), 0.0)


def masked_min(x: Values, mask: Mask) -> Scalar:
    """Least unmasked entry; 0 where there is none."""
    return -masked_max(-x, mask)


def whiten(x: Values, mask: Mask) -> Values:
    """(x - μ)/√(var + 1e-8) over the unmasked entries; 0 where masked.

    Taken of what stands above the least entry: equal ones give 0, not a rounding error blown up by a deviation of 0.
    """
    x = x - masked_min(x, mask)
    return jnp.where(mask, (x - masked_mean(x, mask)) / jnp.sqrt(masked_var(x, mask) + 1e-8), 0.0)


def explained_variance(predictions: Values, targets: Values, mask: Mask) -> Scalar:
    """1 - var(targets - predictions)/var(targets): 1 is a perfect critic, 0 one no better than a constant."""
    return 1.0 - masked_var(targets - predictions, mask) / (masked_var(targets, mask) + 1e-5)
