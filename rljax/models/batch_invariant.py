"""Batch-invariant computation: a token's numbers have the same bits alone, in any batch, decoded or scored.

On XLA's CPU backend three operations depend on the shape of the batch. Each is done here in a way that does not:

    matmuls        kernels for few rows add products in another order: rows are padded to ROWS
    attention      the same holds for few queries and many keys: keys come in blocks of BLOCK, queries in multiples of
                   LANE (`attention.blockwise_attention`)
    sums           a reduction of the last axis is vectorized in several ways: it is done as a tree, as in
                   `ops.logprobs.log_sum_exp`

Everything else is elementwise, a maximum or a gather.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

ROWS = 64
BLOCK = 64
LANE = 16


def pad_rows(x: Float[Array, "M D"], rows: int) -> Float[Array, "N D"]:
    """x with rows of zeros up to `rows`; N = max(M, rows)."""
    if len(x) >= rows:
        return x
    return jnp.pad(x, ((0, rows - len(x)), (0, 0)))
