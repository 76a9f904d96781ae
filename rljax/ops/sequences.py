"""Sums, means and maxima over a sequence, broadcast to its columns.

A sequence is one segment of one row: a packed row holds several, told apart by any integers. Without segments the row
is the sequence. Masked columns are ignored and may hold NaN. For the weights of a loss see `ops.weights`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from rljax.ops.shapes import PerToken, Segments, TokenMask


def _require_bool(mask: jax.Array) -> None:
    """Raise TypeError for segments in the place of a mask: a call with the arguments of a function of `ops.weights`."""
    if mask.dtype != bool:
        raise TypeError(f"mask must be bool, not {mask.dtype}: the arguments are (x, mask, segments)")


def _segment_numbers(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The segments renamed to numbers below T: the number of columns of the row whose id is smaller."""
    return jax.vmap(jnp.searchsorted)(jnp.sort(segments, axis=1), segments)


def sequence_sum(x: PerToken, mask: TokenMask, segments: Segments = None) -> PerToken:
    """Σ_t x over the decisions of the sequence that each column belongs to."""
    _require_bool(mask)
    x = jnp.where(mask, x, 0.0)
    if segments is None:
        return jnp.broadcast_to(x.sum(axis=1, keepdims=True), x.shape)

    def row_sum(terms, ids):
        return jax.ops.segment_sum(terms, ids, num_segments=ids.shape[0])[ids]

    return jax.vmap(row_sum)(x, _segment_numbers(segments))


def sequence_lengths(mask: TokenMask, segments: Segments = None) -> PerToken:
    """n_i: number of decisions in the sequence that each column belongs to."""
    return sequence_sum(mask.astype(float), mask, segments)


def sequence_mean(x: PerToken, mask: TokenMask, segments: Segments = None) -> PerToken:
    """(1/n_i) Σ_t x over the decisions of the sequence that each column belongs to; 0 for one without decisions."""
    return sequence_sum(x, mask, segments) / jnp.maximum(sequence_lengths(mask, segments), 1.0)


def sequence_max(x: PerToken, mask: TokenMask, segments: Segments = None) -> PerToken:
    """max_t x over the decisions of the sequence that each column belongs to; 0 for one without decisions."""
    _require_bool(mask)
    x = jnp.where(mask, x, -jnp.inf)
    if segments is None:
        largest = jnp.broadcast_to(x.max(axis=1, keepdims=True), x.shape)
    else:

        def row_max(terms, ids):
            return jax.ops.segment_max(terms, ids, num_segments=ids.shape[0])[ids]

        largest = jax.vmap(row_max)(x, _segment_numbers(segments))
    return jnp.where(jnp.isneginf(largest), 0.0, largest)


def last_decision(mask: TokenMask, segments: Segments = None) -> TokenMask:
    """True at the last decision of each sequence that has one."""
    column = jnp.broadcast_to(jnp.arange(mask.shape[1]).astype(float)[None], mask.shape)
    return mask & (column == sequence_max(column, mask, segments))
