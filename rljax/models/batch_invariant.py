"""The same bits for a token whatever it is computed with: alone, in a batch, decoded or scored.

Three things depend on the shape of a batch on XLA's CPU backend, and are done here so that they do not:

    matmuls        kernels for few rows add up products in another order: rows are padded to ROWS
    attention      so do products of few queries with many keys: keys come in blocks of BLOCK, queries in multiples of
                   LANE (`attention.blocks`)
    sums           of a last axis are vectorised in more than one way: they are added as a tree, as in
                   `ops.logprobs.log_sum_exp`

Everything else is elementwise, a maximum or a gather.
"""

import jax.numpy as jnp

ROWS = 64
BLOCK = 64
LANE = 16


def at_least(x, rows: int):
    """x [M D] with rows of zeros up to `rows`."""
    return x if len(x) >= rows else jnp.pad(x, ((0, rows - len(x)), (0, 0)))
