"""Sums and means over a sequence, given to each of its columns.

A sequence is one segment of one row: several share a row after packing. Without segments the row is the sequence.
Masked columns take no part, and may hold NaN.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Terms = Float[Array, "B T"]
Mask = Bool[Array, "B T"]
Segments = Int[Array, "B T"] | None


def sequence_sum(x: Terms, mask: Mask, segments: Segments = None) -> Terms:
    """Σ_t x over the decisions of the sequence that each column belongs to."""
    x = jnp.where(mask, x, 0.0)
    if segments is None:
        return jnp.broadcast_to(x.sum(axis=1, keepdims=True), x.shape)

    def one_row(terms, ids):
        return jax.ops.segment_sum(terms, ids, num_segments=ids.shape[0] + 1)[ids]

    return jax.vmap(one_row)(x, segments)


def sequence_lengths(mask: Mask, segments: Segments = None) -> Terms:
    """n_i: decisions in the sequence that each column belongs to."""
    return sequence_sum(mask.astype(float), mask, segments)


def sequence_mean(x: Terms, mask: Mask, segments: Segments = None) -> Terms:
    """(1/n_i) Σ_t x over the decisions of the sequence that each column belongs to; 0 for one without decisions."""
    return sequence_sum(x, mask, segments) / jnp.maximum(sequence_lengths(mask, segments), 1.0)


def sequence_max(x: Terms, mask: Mask, segments: Segments = None) -> Terms:
    """max_t x over the decisions of the sequence that each column belongs to; 0 for one without decisions."""
    x = jnp.where(mask, x, -jnp.inf)
    if segments is None:
        largest = jnp.broadcast_to(x.max(axis=1, keepdims=True), x.shape)
    else:
        most = lambda terms, ids: jax.ops.segment_max(terms, ids, num_segments=ids.shape[0] + 1)[ids]  # noqa: E731
        largest = jax.vmap(most)(x, segments)
    return jnp.where(jnp.isneginf(largest), 0.0, largest)


def last_decision(mask: Mask, segments: Segments = None) -> Mask:
    """True at the last decision of each sequence that has one."""
    column = jnp.broadcast_to(jnp.arange(mask.shape[1]).astype(float)[None], mask.shape)
    return mask & (column == sequence_max(column, mask, segments))
