"""Precision of sums: half-precision numbers as float32."""

from typing import Any

import jax
import jax.numpy as jnp


def at_least_float32(tree: Any) -> Any:
    """The tree with float32 copies of its bfloat16 and float16 leaves; the others as they are."""
    return jax.tree.map(_widened, tree)


def cast_like(tree: Any, like: Any) -> Any:
    """The tree, each leaf in the dtype of the leaf of `like` in its place."""
    return jax.tree.map(lambda x, y: x if x.dtype == y.dtype else x.astype(y.dtype), tree, like)


def _widened(x):
    x = jnp.asarray(x)
    half = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return x.astype(jnp.float32) if half else x
