"""pass@k: the probability that k completions of a prompt contain a correct one (arXiv:2107.03374, eq. 1); maj@k."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Counts = int | Int[Array, "*P"] | Float[Array, "*P"]


def pass_at_k(count: Counts, correct: Counts, k: int) -> Float[Array, "*P"]:
    """The unbiased estimate from `correct` correct completions among `count`.

        1 - C(n-c, k)/C(n, k) = 1 - Π_{j<k} (n-c-j)/(n-j)        1 where n - c < k

    NaN where there are fewer than k completions, correct or not: to keep only the prompts that are solved is a bias.
    """
    n = jnp.asarray(count)[..., None]
    c = jnp.asarray(correct)[..., None]
    j = jnp.arange(k).reshape((1,) * (n.ndim - 1) + (k,))
    factor = jnp.maximum(n - c - j, 0) / jnp.maximum(n - j, 1)
    return jnp.where(n >= k, 1.0 - factor.prod(axis=-1, keepdims=True), jnp.nan)[..., 0]


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


def majority_at_k(answers: Int[Array, "P n"], correct: Bool[Array, "P n"], k: int) -> Float[Array, " P"]:
    """maj@k: how often the answer that most of k completions give is correct (self-consistency, arXiv:2203.11171).

    The mean over the n // k blocks of k consecutive completions. Of answers that are equally frequent one is
    drawn: their mean counts. A block without an answer is wrong.

    Args:
      answers: an id for each different answer of a prompt, -1 for none. Raises ValueError for k below 1 or above n.
    """
    P, n = answers.shape
    if not 1 <= k <= n:
        raise ValueError(f"the majority of {k} of {n} completions; legal: 1 to {n}")
    blocks = n // k
    answer = answers[:, : blocks * k].reshape(P, blocks, k)
    right = correct[:, : blocks * k].reshape(P, blocks, k)
    equal = (answer[..., :, None] == answer[..., None, :]) & (answer >= 0)[..., None]
    votes = equal.sum(axis=-1)  # of each completion's answer
    is_most = (votes > 0) & (votes == votes.max(axis=-1, keepdims=True))
    share = jnp.where(is_most, 1.0 / jnp.maximum(votes, 1), 0.0)  # an answer's completions make 1 together
    won = (share * right).sum(axis=-1) / jnp.maximum(share.sum(axis=-1), 1.0)
    return won.mean(axis=-1)


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4 .. and n: the k that are looked at."""
    return sorted({*(2**j for j in range(n.bit_length()) if 2**j <= n), n})
