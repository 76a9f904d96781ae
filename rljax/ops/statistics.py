"""Statistics under a mask, over all axes. Masked entries may be NaN."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from rljax.ops.shapes import Elementwise, Scalar

ElementMask = Bool[Array, "*shape"]


def masked_mean(x: Elementwise, mask: ElementMask) -> Float[Array, ""]:
    """Mean of the unmasked entries; 0 where there is none."""
    return jnp.where(mask, x, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def masked_var(x: Elementwise, mask: ElementMask) -> Float[Array, ""]:
    """Unbiased variance (ddof 1) of the unmasked entries; 0 for fewer than two."""
    centered = jnp.where(mask, x - masked_mean(x, mask), 0.0)
    return (centered**2).sum() / jnp.maximum(mask.sum() - 1, 1)


def masked_std(x: Elementwise, mask: ElementMask) -> Float[Array, ""]:
    """Square root of `masked_var`."""
    return jnp.sqrt(masked_var(x, mask))


def masked_max(x: Elementwise, mask: ElementMask) -> Float[Array, ""]:
    """Largest unmasked entry; 0 where there is none."""
    return jnp.where(mask.any(), jnp.where(mask, x, -jnp.inf).max(), 0.0)


def masked_min(x: Elementwise, mask: ElementMask) -> Float[Array, ""]:
    """Smallest unmasked entry; 0 where there is none."""
    return -masked_max(-x, mask)


def nan_where_none(value: Scalar, count: int | float | Shaped[Array, ""]) -> Float[Array, ""]:
    """The value, a statistic of `count` entries; NaN where there is none: what was not measured is not 0.

    For metrics. This NaN is meant: `jax_debug_nans` does not stop at it.
    """
    with jax.debug_nans(False):
        return jnp.where(count > 0, value, jnp.nan)


def whiten(x: Elementwise, mask: ElementMask) -> Elementwise:
    """(x - μ)/√(var + 1e-8) over the unmasked entries; 0 where masked.

    Computed of x minus its smallest entry: equal entries give 0, not a rounding error divided by a deviation near 0.
    """
    x = x - masked_min(x, mask)
    return jnp.where(mask, (x - masked_mean(x, mask)) / jnp.sqrt(masked_var(x, mask) + 1e-8), 0.0)


def explained_variance(predictions: Elementwise, targets: Elementwise, mask: ElementMask) -> Float[Array, ""]:
    """1 - var(targets - predictions)/var(targets): 1 for a perfect critic, 0 for one no better than a constant."""
    return 1.0 - masked_var(targets - predictions, mask) / (masked_var(targets, mask) + 1e-5)
