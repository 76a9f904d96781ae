"""Statistics of the rows that answer the same prompt.

Groups are told by id, in any order, of any size: row order never matters. Rows with valid False (could not be judged)
take no part in any statistic.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def group_sum(x: Float[Array, " B"], group: Int[Array, " B"]) -> Float[Array, " B"]:
    """Σ of x over the rows with the same id, given back to each of them."""
    _, ids = jnp.unique(group, return_inverse=True, size=group.shape[0])
    return jax.ops.segment_sum(x, ids, num_segments=group.shape[0])[ids]


def group_count(group: Int[Array, " B"], valid: Bool[Array, " B"]) -> Float[Array, " B"]:
    """Valid rows in the group of each row."""
    return group_sum(valid.astype(jnp.float32), group)


def group_mean(x: Float[Array, " B"], group: Int[Array, " B"], valid: Bool[Array, " B"]) -> Float[Array, " B"]:
    """Mean over the valid rows of each row's group; 0 for a group without one."""
    total = group_sum(jnp.where(valid, x, 0.0), group)
    return total / jnp.maximum(group_count(group, valid), 1.0)


def group_std(x: Float[Array, " B"], group: Int[Array, " B"], valid: Bool[Array, " B"]) -> Float[Array, " B"]:
    """Unbiased standard deviation (ddof 1) over the valid rows of each row's group; 0 for fewer than two."""
    centred = jnp.where(valid, x - group_mean(x, group, valid), 0.0)
    variance = group_sum(centred**2, group) / jnp.maximum(group_count(group, valid) - 1.0, 1.0)
    return jnp.sqrt(variance)


def leave_one_out_mean(x: Float[Array, " B"], group: Int[Array, " B"], valid: Bool[Array, " B"]) -> Float[Array, " B"]:
    """Mean over the *other* valid rows of each row's group; 0 where there is no other."""
    own = jnp.where(valid, x, 0.0)
    others = group_count(group, valid) - valid
    return (group_sum(own, group) - own) / jnp.maximum(others, 1.0)
