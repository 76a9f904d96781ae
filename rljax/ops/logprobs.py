"""Log-probs and entropies of chosen tokens, without an array of [B T V].

`chosen_logp` is the one log-prob function: the sampler calls it on the logits it draws from, the trainer through
`chunked_logprobs`, so that the two agree to the rounding of the matmuls.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Softmax(NamedTuple):
    """The parts of a softmax that sampling a token and computing its log-prob share."""

    scaled: Float[Array, "*N V"]  # z/τ
    masses: Float[Array, "*N V"]  # e^(z/τ - top): the probabilities up to a factor per row, the largest near 1
    top: Float[Array, "*N 1"]  # the largest z/τ without its last bit; constant under differentiation


def softmax(logits: Float[Array, "*N V"], temperature: Float[Array, "*N"]) -> Softmax:
    """Softmax of z/τ, in float32 or better.

    The last bit of the largest entry is dropped: with it, XLA's CPU backend fuses maximum and exponential for some
    shapes and not for others, and the exponentials of the two kernels round differently.
    """
    return _parts(_scaled(logits, temperature))


def chosen_logp(
    logits: Float[Array, "*N V"], actions: Int[Array, "*N"], temperature: Float[Array, "*N"]
) -> Float[Array, "*N"]:
    """log softmax(z/τ)[a], in float32 or better: a gather minus a log-sum-exp, so no [V] array of log-probs is made."""
    return softmax_logp(softmax(logits, temperature), actions)


def softmax_logp(dist: Softmax, actions: Int[Array, "*N"]) -> Float[Array, "*N"]:
    """`chosen_logp` from a softmax that was computed before."""
    return jnp.take_along_axis(dist.scaled, actions[..., None], axis=-1)[..., 0] - _log_sum(dist)


def log_sum_exp(x: Float[Array, "*N V"]) -> Float[Array, "*N"]:
    """log Σ_v exp(x_v), bit-identical for a row whatever other rows are in the batch: sampler and trainer batch
    differently.
    """
    return _log_sum(_parts(x))


def _parts(x) -> Softmax:
    top = jax.lax.stop_gradient(x.max(axis=-1, keepdims=True))
    top = jax.lax.reduce_precision(jnp.where(jnp.isfinite(top), top, 0.0), exponent_bits=8, mantissa_bits=22)
    return Softmax(x, jnp.exp(x - top), top)


def _log_sum(dist: Softmax):
    return jnp.log(tree_sum(dist.masses)) + dist.top[..., 0]


def tree_sum(x: Float[Array, "*N V"]) -> Float[Array, "*N"]:
    """Sum over the last axis by pairwise halves: in a fixed order, where that of a reduction depends on the shape."""
    while x.shape[-1] > 1:
        half = -(-x.shape[-1] // 2)
        high = jnp.pad(x[..., half:], ((0, 0),) * (x.ndim - 1) + ((0, 2 * half - x.shape[-1]),))
        x = x[..., :half] + high
    return x[..., 0]


def entropy(logits: Float[Array, "*N V"], temperature: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """H = -Σ_v π(v) log π(v), in nats. Tokens of logit -inf add 0 (0 · log 0)."""
    log_pi = _log_softmax(logits, temperature)
    return -jnp.where(jnp.isneginf(log_pi), 0.0, jnp.exp(log_pi) * log_pi).sum(axis=-1)


def sum_pi_squared(logits: Float[Array, "*N V"], temperature: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """Σ_v π(v)²: the probability that two draws agree (collision). exp(logsumexp(2z/τ) - 2 logsumexp(z/τ))."""
    scaled = _scaled(logits, temperature)
    return jnp.exp(log_sum_exp(2.0 * scaled) - 2.0 * log_sum_exp(scaled))


def _log_softmax(logits, temperature):
    scaled = _scaled(logits, temperature)
    return scaled - log_sum_exp(scaled)[..., None]


def _scaled(logits, temperature):
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature[..., None]


def gaussian_logp(
    mean: Float[Array, "*N D"], std: Float[Array, "*N D"], actions: Float[Array, "*N D"]
) -> Float[Array, "*N"]:
    """log N(a; μ, σ²) = -½ Σ_d ((a - μ)²/σ² + log 2πσ²) over D independent dimensions."""
    return -0.5 * (((actions - mean) / std) ** 2 + jnp.log(2.0 * jnp.pi * std**2)).sum(axis=-1)


@jax.custom_jvp
def token_statistics(
    logits: Float[Array, "*N V"], actions: Int[Array, "*N"], temperature: Float[Array, "*N"]
) -> tuple[Float[Array, "*N"], Float[Array, "*N"], Float[Array, "*N"]]:
    """`chosen_logp`, `entropy` and `sum_pi_squared` at once, with one derivative for the three:

        d log π(a) = Σ_v (1[v = a] - π_v) dz_v / τ
        d H        = -Σ_v π_v (log π_v + H) dz_v / τ
        d Σ π²     = 2 Σ_v π_v (π_v - Σ π²) dz_v / τ

    One elementwise backward pass, whichever of them are used. The temperature is a constant.
    """
    return chosen_logp(logits, actions, temperature), entropy(logits, temperature), sum_pi_squared(logits, temperature)


@token_statistics.defjvp
def _token_statistics_jvp(primals, tangents):
    logits, actions, temperature = primals
    _, h, squares = out = token_statistics(*primals)
    log_pi = _log_softmax(logits, temperature)
    pi = jnp.exp(log_pi)
    chosen = jax.lax.broadcasted_iota(actions.dtype, pi.shape, pi.ndim - 1) == actions[..., None]
    dz = tangents[0].astype(pi.dtype) / temperature[..., None]
    surprise = jnp.where(jnp.isneginf(log_pi), 0.0, log_pi) + h[..., None]
    slopes = chosen - pi, -pi * surprise, 2.0 * pi * (pi - squares[..., None])
    return out, tuple((slope * dz).sum(axis=-1) for slope in slopes)


def chunked_logprobs(
    logits_of: Callable[[Array], Array],
    hidden: Float[Array, "B T D"],
    actions: Int[Array, "B T"],
    temperature: Float[Array, "B T"],
    chunk_tokens: int,
    support: Int[Array, "B T k"] | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-prob, entropy and Σ π² of each decision, computed for about `chunk_tokens` decisions at a time.

    Columns are split, never rows, so rows keep their sharding. The backward pass recomputes each chunk's logits, if
    there are several: the largest live array is [B, chunk_tokens / B, V].

    Args:
      logits_of: hidden [.. D] -> logits [.. V].
      support: the tokens that each decision was drawn from; the three are then of the distribution renormalized over
      them (Keep Sampling Mask, DeepSeek-V3.2, arXiv:2512.02556). The log-prob of an action outside is NaN.
    """

    def chunk_statistics(h, a, t):
        return token_statistics(logits_of(h), a, t)

    def chunk_statistics_on_support(h, a, t, ids):
        ids = or_only_action(ids, a)
        return token_statistics(on_support(logits_of(h), ids), index_in_support(ids, a), t)

    if support is not None:
        return in_chunks(chunk_statistics_on_support, chunk_tokens, hidden, actions, temperature, support)
    return in_chunks(chunk_statistics, chunk_tokens, hidden, actions, temperature)


def on_support(logits: Float[Array, "*N V"], support: Int[Array, "*N k"]) -> Float[Array, "*N k"]:
    """The logits of the tokens in `support`; -inf where it holds none (-1). A softmax of them renormalizes over it."""
    kept = jnp.take_along_axis(logits, jnp.maximum(support, 0), axis=-1)
    return jnp.where(support >= 0, kept, -jnp.inf)


def index_in_support(support: Int[Array, "*N k"], actions: Int[Array, "*N"]) -> Int[Array, "*N"]:
    """Where in its support each action stands; k, whose log-prob is NaN, where it does not."""
    return jnp.where(support == actions[..., None], _slots(support), support.shape[-1]).min(axis=-1)


def or_only_action(support: Int[Array, "*N k"], actions: Int[Array, "*N"]) -> Int[Array, "*N k"]:
    """The support, and where it is empty (a token that no sampler drew) the action alone, whose log-prob is then 0."""
    is_empty = (support < 0).all(axis=-1, keepdims=True)
    is_first = _slots(support) == 0
    return jnp.where(is_empty & is_first, actions[..., None].astype(support.dtype), support)


def _slots(support: Int[Array, "*N k"]) -> Int[Array, "*N k"]:
    """0 .. k-1 along the last axis."""
    return jax.lax.broadcasted_iota(support.dtype, support.shape, support.ndim - 1)


def in_chunks(f: Callable, chunk_tokens: int, *columns: Array):
    """f(*columns) of arrays [B T ...], a pytree of [B T], for about `chunk_tokens` decisions at a time.

    The backward pass recomputes each chunk. A single one is kept: the backward pass begins with it, so the peak of
    memory is the same. Of C chunks the k-th has columns k, k + C, ...: each has some of every device's, where columns
    are laid out contiguously over devices.
    """
    B, T = columns[0].shape[:2]
    chunks = -(-T // min(T, max(1, chunk_tokens // B)))
    width = -(-T // chunks)  # what fills up the last chunk is computed too: fewer columns than there are chunks

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, chunks * width - T)) + ((0, 0),) * (x.ndim - 2), mode="edge")
        return jnp.moveaxis(x.reshape(B, width, chunks, *x.shape[2:]), 2, 0)

    if chunks == 1:
        return f(*columns)
    rematerialized = jax.checkpoint(f)
    out = jax.lax.map(lambda chunk: rematerialized(*chunk), tuple(map(split, columns)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(B, chunks * width)[:, :T], out)
