"""pass@k: the probability that k completions of a prompt contain a correct one (arXiv:2107.03374, eq. 1)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Counts = int | Int[Array, "*P"] | Float[Array, "*P"]


def pass_at_k(count: Counts, correct: Counts, k: int) -> Float[Array, "*P"]:
    """The unbiased estimate from `correct` correct completions among `count`.

        1 - C(n-c, k)/C(n, k) = 1 - Π_{j<k} (n-c-j)/(n-j)        1 where n - c < k

    NaN where it is not known: fewer than k completions and none of them correct.
    """
    n = jnp.asarray(count)[..., None]
    c = jnp.asarray(correct)[..., None]
    j = jnp.arange(k).reshape((1,) * (n.ndim - 1) + (k,))
    factor = jnp.maximum(n - c - j, 0) / jnp.maximum(n - j, 1)
    return jnp.where((c > 0) | (n >= k), 1.0 - factor.prod(axis=-1, keepdims=True), jnp.nan)[..., 0]
