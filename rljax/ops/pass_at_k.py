"""pass@k: the probability that k completions of a prompt contain a correct one (arXiv:2107.03374, eq. 1)."""

import math

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


def expected_best(rewards: Float[Array, "*P n"], k: int) -> Float[Array, "*P"]:
    """The mean over all subsets of k of the n rewards of a prompt of their maximum (WebGPT, arXiv:2112.09332).

        Σ_i C(i-1, k-1)/C(n, k) r_(i)        r_(1) <= ... <= r_(n)

    Without bias the reward of best-of-k sampling. Raises ValueError for k below 1 or above n.
    """
    n = rewards.shape[-1]
    if not 1 <= k <= n:
        raise ValueError(f"the best of {k} of {n} rewards; legal: 1 to {n}")
    weights = [math.comb(i, k - 1) / math.comb(n, k) for i in range(n)]
    return jnp.sort(rewards, axis=-1) @ jnp.asarray(weights, rewards.dtype)


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1)/n: the KL in nats of best-of-n sampling to the policy, where no two of its completions are equal
    and no two rewards; in general an upper bound (arXiv:2401.01879).
    """
    return math.log(n) - (n - 1) / n
