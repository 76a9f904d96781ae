"""Statistics over the rows of one prompt (a group).

A group is the rows with one id, in any order and of any size: row order never matters. Rows with valid False (whose
reward failed) are excluded from every statistic.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rljax.ops.statistics import nan_where_none


def group_sum(x: Float[Array, "B *rest"], group: Int[Array, " B"]) -> Float[Array, "B *rest"]:
    """Σ of x over the rows with the same id, on each of these rows."""
    _, ids = jnp.unique(group, return_inverse=True, size=group.shape[0])
    return jax.ops.segment_sum(x, ids, num_segments=group.shape[0])[ids]


def group_count(group: Int[Array, " B"], valid: Bool[Array, " B"]) -> Float[Array, " B"]:
    """Number of valid rows in the group of each row."""
    return group_sum(valid.astype(float), group)


def standard_error(
    total: Float[Array, " B"], count: Float[Array, " B"] | Bool[Array, " B"], group: Int[Array, " B"]
) -> Float[Array, ""]:
    """Standard error of r = Σ total / Σ count, where the rows of a group are not independent but groups are.

        √(P/(P - 1) Σ_p (t_p - r c_p)²) / Σ count     t_p and c_p the sums over group p, P the groups that count

    The mean of x over the valid rows is that of total = where(valid, x, 0) and count = valid; with one row a group this
    is std/√B. NaN for fewer than two groups. (Cochran, Sampling Techniques, 1977, chapter 6: the variance of a ratio.)
    """
    count = count.astype(float)
    ratio = total.sum() / jnp.maximum(count.sum(), 1.0)
    residual = group_sum(total - ratio * count, group)
    size = group_sum(jnp.ones_like(total), group)
    groups = jnp.where(group_sum(count, group) > 0, 1.0 / size, 0.0).sum()
    variance = groups / jnp.maximum(groups - 1.0, 1.0) * (residual**2 / size).sum()
    return nan_where_none(jnp.sqrt(variance) / jnp.maximum(count.sum(), 1.0), groups > 1.5)


def group_min(x: Float[Array, " B"], group: Int[Array, " B"], valid: Bool[Array, " B"]) -> Float[Array, " B"]:
    """The smallest valid x of each row's group, 0 for a group without one.

    Means are taken of x minus it: the mean of equal values is then exact to the last bit, and a group of equal rewards
    has advantage 0, not a rounding error divided by a standard deviation near 0.
    """
    _, ids = jnp.unique(group, return_inverse=True, size=group.shape[0])
    smallest = jax.ops.segment_min(jnp.where(valid, x, jnp.inf), ids, num_segments=group.shape[0])[ids]
    return jnp.where(jnp.isfinite(smallest), smallest, 0.0)


def group_mean(x: Float[Array, " B"], group: Int[Array, " B"], valid: Bool[Array, " B"]) -> Float[Array, " B"]:
    """Mean over the valid rows of each row's group; 0 for a group without one."""
    smallest = group_min(x, group, valid)
    total = group_sum(jnp.where(valid, x - smallest, 0.0), group)
    return smallest + total / jnp.maximum(group_count(group, valid), 1.0)


def group_std(x: Float[Array, " B"], group: Int[Array, " B"], valid: Bool[Array, " B"]) -> Float[Array, " B"]:
    """Unbiased standard deviation (ddof 1) over the valid rows of each row's group; 0 for fewer than two."""
    variance = group_sum(center(x, group, valid) ** 2, group) / jnp.maximum(group_count(group, valid) - 1.0, 1.0)
    return jnp.sqrt(variance)


def leave_one_out_mean(x: Float[Array, " B"], group: Int[Array, " B"], valid: Bool[Array, " B"]) -> Float[Array, " B"]:
    """Mean over the *other* valid rows of each row's group; 0 where there is no other."""
    smallest = group_min(x, group, valid)
    own = jnp.where(valid, x - smallest, 0.0)
    others = group_count(group, valid) - valid
    return jnp.where(others > 0, smallest + (group_sum(own, group) - own) / jnp.maximum(others, 1.0), 0.0)


def leave_one_out_max(x: Float[Array, " B"], group: Int[Array, " B"], valid: Bool[Array, " B"]) -> Float[Array, " B"]:
    """Largest x among the *other* valid rows of each row's group; -inf where there is no other."""
    others = (group[:, None] == group[None, :]) & valid[None, :] & ~jnp.eye(len(x), dtype=bool)
    return jnp.where(others, x[None, :], -jnp.inf).max(axis=1)


def group_max(x: Float[Array, " B"], group: Int[Array, " B"], valid: Bool[Array, " B"]) -> Float[Array, " B"]:
    """The largest valid x of each row's group, 0 for a group without one."""
    return -group_min(-x, group, valid)


def first_best(x: Float[Array, " B"], group: Int[Array, " B"], valid: Bool[Array, " B"]) -> Bool[Array, " B"]:
    """True on one row of each group that has a valid one: that of the largest valid x, the first of several."""
    row = jnp.arange(len(x))
    rivals = (group[:, None] == group[None, :]) & valid[None, :]
    earlier = (x[None, :] == x[:, None]) & (row[None, :] < row[:, None])
    better = (x[None, :] > x[:, None]) | earlier
    return valid & ~(rivals & better).any(axis=1)


def center(x: Float[Array, " B"], group: Int[Array, " B"], valid: Bool[Array, " B"]) -> Float[Array, " B"]:
    """x - mean over the valid rows of the group; 0 for rows not valid."""
    return jnp.where(valid, x - group_mean(x, group, valid), 0.0)


def standardize(
    x: Float[Array, " B"], group: Int[Array, " B"], valid: Bool[Array, " B"], epsilon: float = 1e-6
) -> Float[Array, " B"]:
    """(x - mean)/(std + ε) over the valid rows of the group, std unbiased; 0 for rows not valid."""
    return center(x, group, valid) / (group_std(x, group, valid) + epsilon)


def zero_std(x: Float[Array, " B"], group: Int[Array, " B"], valid: Bool[Array, " B"]) -> Bool[Array, " B"]:
    """Rows whose group has the same x on every valid row, so that group-relative advantages are 0."""
    return group_std(x, group, valid) < 1e-6
