"""Batch-invariant computation: a token's numbers have the same bits alone, in any batch, decoded or scored.

Three operations round differently for another number of rows. Each is done here in pieces whose shape does not depend
on the batch:

    matmuls        rows in tiles of ROWS, one tile after the other: every product is [ROWS D] x [D N]
    attention      queries in tiles of LANE, keys in blocks of BLOCK, values padded to whole BLOCKs of width
                   (`attention.blockwise_attention`): every product is [LANE K] x [K BLOCK] or [LANE BLOCK] x [BLOCK K']
    sums           the last axis is added up as a tree, as in `ops.logprobs.log_sum_exp`

Everything else is elementwise, a maximum or a gather. Whichever kernel a backend has for a shape, all batches get the
same one. The derivatives are those of the plain products, since nothing compares the bits of a gradient.
`rollouts.self_check` measures what is left on the machine at hand.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ROWS = 64
BLOCK = 64
LANE = 16


def pad_axis(x: Float[Array, "..."], axis: int, multiple: int) -> Float[Array, "..."]:
    """x with zeros (False) at the end of an axis, up to a multiple."""
    extra = [(0, 0)] * x.ndim
    extra[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, extra)


def split_tiles(x: Float[Array, "..."], axis: int, size: int) -> Float[Array, "N ..."]:
    """x cut into tiles of `size` along an axis, the last one padded: the tiles are the first axis of the result."""
    padded = pad_axis(x, axis, size)
    shape = (*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(padded.reshape(shape), axis, 0)


def join_tiles(tiles: Float[Array, "N ..."], axis: int, length: int) -> Float[Array, "..."]:
    """The inverse of `split_tiles`, for an axis that had this length."""
    moved = jnp.moveaxis(tiles, 0, axis)
    joined = moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])
    return jax.lax.slice_in_dim(joined, 0, length, axis=axis)


def matmul(x: Float[Array, "M D"], weight: Float[Array, "D N"], dtype=None) -> Float[Array, "M N"]:
    """x · W in tiles of ROWS rows. dtype: of the result; None: that of x."""
    return _matmul(x, weight, jnp.dtype(dtype or x.dtype))


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _matmul(x, weight, dtype):
    def multiply_tile(tile):
        return jnp.matmul(tile, weight, preferred_element_type=dtype)

    return join_tiles(jax.lax.map(multiply_tile, split_tiles(x, 0, ROWS)), 0, len(x))


@_matmul.defjvp
def _matmul_jvp(dtype, primals, tangents):
    x, weight = primals
    x_tangent, weight_tangent = tangents
    of_x = jnp.matmul(x_tangent, weight, preferred_element_type=dtype)
    of_weight = jnp.matmul(x, weight_tangent, preferred_element_type=dtype)
    return _matmul(x, weight, dtype), of_x + of_weight
