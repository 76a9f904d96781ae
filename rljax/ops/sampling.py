"""Sampling of tokens: one uniform number per row, inverted through the cumulative distribution.

The uniform of a token depends on (seed, step, prompt, sample, position) alone, so the sample does not depend on the
batch split or the mesh. The vocabulary is not sorted: thresholds are found by bisection over the bit patterns of the
probabilities, which is exact and some forty times cheaper than a sort on a CPU. Where at most k tokens are wanted
(`truncate_to`) they are found first.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

Probs = Float[Array, "B V"]
Column = Float[Array, "B 1"]
PASSES_A_TURN = {"cpu": 1}  # of the search for a threshold, by backend
PASSES_ELSEWHERE = 4  # there each turn of a loop waits for the host; passes that find the search ended change nothing


def row_keys(seed: Int[Array, ""], step: Int[Array, "*#B"], prompt: Int[Array, " B"], sample: Int[Array, " B"]):
    """One key per row: fold_in(seed, step, prompt, sample). [B]"""
    fold = jax.vmap(jax.random.fold_in)
    base = fold(jnp.broadcast_to(jax.random.key(seed), prompt.shape), jnp.broadcast_to(step, prompt.shape))
    return fold(fold(base, prompt), sample)


def token_uniforms(keys: Key[Array, " B"], position: Int[Array, "*#B"]) -> Float[Array, " B"]:
    """The number in [0, 1) that selects the token at `position` (of each row, or of all) of each row's completion."""

    def uniform(key, p):
        return jax.random.uniform(jax.random.fold_in(key, p))

    return jax.vmap(uniform)(keys, jnp.broadcast_to(position, keys.shape))


def argmax(x: Float[Array, "*N V"]) -> Int[Array, "*N"]:
    """First index of the maximum, as a max and a min: jnp.argmax is several times slower on a CPU.

    The last index where an entry is NaN, which equals nothing.
    """
    V = x.shape[-1]
    places = jnp.where(x == x.max(axis=-1, keepdims=True), jnp.arange(V).reshape((1,) * (x.ndim - 1) + (V,)), V)
    return jnp.minimum(places.min(axis=-1), V - 1)


def invert_cdf(probs: Probs, uniform: Float[Array, " B"], block: int = 128) -> Int[Array, " B"]:
    """The token v with cdf(v - 1) <= u · Σp < cdf(v), found in two levels: among blocks, then inside one.

    Tokens of probability 0 are never sampled. `probs` need not sum to one.
    """
    B, V = probs.shape
    if block >= V:
        return _crossing(probs, jnp.cumsum(probs, axis=-1), _below(uniform, probs.sum(axis=-1)))
    blocks = -(-V // block)
    table = jnp.pad(probs, ((0, 0), (0, blocks * block - V))).reshape(B, blocks, block)
    upper = jnp.cumsum(table.sum(axis=-1), axis=-1)
    target = _below(uniform, upper[:, -1])
    where = _crossing(table.sum(axis=-1), upper, target)
    inside = jnp.take_along_axis(table, where[:, None, None], axis=1)[:, 0]
    below = jnp.take_along_axis(jnp.pad(upper, ((0, 0), (1, 0))), where[:, None], axis=1)
    return where * block + _crossing(inside, below + jnp.cumsum(inside, axis=-1), target)


def _crossing(mass: Float[Array, "B N"], cdf: Float[Array, "B N"], target: Float[Array, " B"]) -> Int[Array, " B"]:
    """First entry with mass whose cdf is above the target; if rounding leaves none, the last entry with mass.

    XLA sums long prefixes as a tree: a computed cdf may rise at an entry without mass, or fall.
    """
    N = mass.shape[-1]
    index = jnp.arange(N)[None]
    positive = mass > 0
    first = jnp.where(positive & (cdf > target[:, None]), index, N).min(axis=-1)
    last = jnp.where(positive, index, 0).max(axis=-1)
    return jnp.where(first < N, first, last)


def _below(uniform, total):
    """u · Σp, and less than Σp."""
    return jnp.minimum(uniform * total, jnp.nextafter(total, 0.0))


def _threshold(probs: Probs, target: Column, low: Column, size: Callable, least: Callable) -> Column:
    """A τ for which the set {p >= τ} is the smallest whose size is at least `target`.

    Non-negative floats sort as their bit patterns do. The interval of patterns that holds τ is split where the log of
    the size, interpolated linearly in the pattern, meets the target (regula falsi), until at most one token may still
    go, or one pattern is left (tied tokens). The residual of an end that stays twice is halved (Illinois; Dowell &
    Jarratt 1971), so that both ends close in. Last, the least likely token goes if the others suffice.

    Args:
      low: a τ at which the target is met.
      size: τ [B 1] -> [B 1], the number of tokens of {p >= τ}, or their mass.
      least: τ -> the least that a token of {p >= τ} adds to the size.
    """
    top = probs.max(axis=-1, keepdims=True)

    def residual(size_at, low):
        """log size - log(target and a token): the middle of what ends the search."""
        return jnp.log(jnp.maximum(size_at, 1e-3 * target)) - jnp.log(target + least(_to_float(low)))

    def unfinished(low, high, size_low):
        return (high - low > 1) & (size_low - 2 * least(_to_float(low)) >= target)

    def narrow(state):
        (low, high, size_low), (residual_low, residual_high), stayed = state
        fraction = jnp.clip(residual_low / jnp.maximum(residual_low - residual_high, 1e-9), 0.02, 0.98)
        middle = low + (fraction * (high - low).astype(jnp.float32)).astype(jnp.int32)
        middle = jnp.clip(middle, low + 1, jnp.maximum(high - 1, low + 1))
        size_middle = size(_to_float(middle))
        residual_middle = residual(size_middle, low)

        active = unfinished(low, high, size_low)
        up = active & (size_middle >= target)
        down = active & ~(size_middle >= target)
        halved_low = jnp.where(down & (stayed > 0), 0.5, 1.0) * residual_low
        halved_high = jnp.where(up & (stayed < 0), 0.5, 1.0) * residual_high
        residual_low = jnp.where(up, jnp.maximum(residual_middle, 1e-6), halved_low)
        residual_high = jnp.where(down, jnp.minimum(residual_middle, -1e-6), halved_high)
        ends = jnp.where(up, middle, low), jnp.where(down, middle, high), jnp.where(up, size_middle, size_low)
        return ends, (residual_low, residual_high), jnp.where(up, -1, jnp.where(down, 1, stayed))

    def turn(state):
        for _ in range(PASSES_A_TURN.get(jax.default_backend(), PASSES_ELSEWHERE)):
            state = narrow(state)
        return state

    size_low = size(low)
    low = _to_bits(low)
    residuals = jnp.maximum(residual(size_low, low), 1e-6), jnp.minimum(residual(0.5 * least(top), low), -1e-6)
    start = (low, _to_bits(top) + 1, size_low), residuals, jnp.zeros_like(low)
    (low, *_), *_ = jax.lax.while_loop(lambda state: unfinished(*state[0]).any(), turn, start)
    low = _to_float(low)
    kept = _fold(jnp.where(probs >= low, probs, jnp.inf), jnp.minimum, fill=jnp.inf)
    above = _to_float(_to_bits(kept.min(axis=-1, keepdims=True)) + 1)
    return jnp.where(size(above) >= target, above, low)


def _to_bits(x: Float[Array, "..."]) -> Int[Array, "..."]:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _to_float(bits: Int[Array, "..."]) -> Float[Array, "..."]:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _fold(x: Probs, combine: Callable, fill: float = 0.0, width: int = 256) -> Float[Array, "B W"]:
    """The last axis folded by halves to at most `width` entries; `fill` stands for what is missing.

    Elementwise, so that XLA's CPU backend computes x within the same loop: a reduction would read x from memory.
    """
    while x.shape[-1] > width:
        half = -(-x.shape[-1] // 2)
        high = jnp.pad(x[..., half:], ((0, 0), (0, 2 * half - x.shape[-1])), constant_values=fill)
        x = combine(x[..., :half], high)
    return x


def _sum(x: Probs) -> Column:
    return _fold(x, jnp.add).sum(axis=-1, keepdims=True)


def truncate(
    probs: Probs,
    top_k: Int[Array, " B"] | None = None,
    top_p: Float[Array, " B"] | None = None,
    min_p: Float[Array, " B"] | None = None,
) -> Probs:
    """Probabilities with excluded tokens set to 0, not renormalized. Tokens tied at a threshold stay together. `probs`
    need not sum to one.

    top_k keeps the k most likely tokens; top_p the fewest most likely ones with at least the fraction p of the mass
    that top_k left; min_p those with p(v) >= min_p · max p. They are applied in this order, as in transformers.
    """

    def count(tau: Column) -> Column:
        return _sum((probs >= tau).astype(jnp.float32))

    def mass(tau: Column) -> Column:
        return _sum(jnp.where(probs >= tau, probs, 0.0))

    tau = jnp.zeros_like(probs[:, :1])
    if top_k is not None:
        k = jnp.minimum(top_k, probs.shape[-1])[:, None].astype(jnp.float32)
        tau = _threshold(probs, k, _below_top_k(probs, k, count), count, jnp.ones_like)
    if top_p is not None:
        total = mass(tau)
        held = top_p[:, None] * total
        # The tokens below τ hold the rest of the mass, each less than τ.
        below = 0.99 * jnp.maximum(total - held, 0.0) / probs.shape[-1]
        of_top_p = _threshold(probs, held, jnp.maximum(below, tau), mass, lambda tau: tau)
        tau = jnp.where(top_p[:, None] >= 1.0, tau, of_top_p)
    if min_p is not None:
        tau = jnp.maximum(tau, min_p[:, None] * probs.max(axis=-1, keepdims=True))
    return jnp.where(probs >= tau, probs, 0.0)


def truncate_to(
    probs: Probs,
    k: int,
    top_k: Int[Array, " B"] | None = None,
    top_p: Float[Array, " B"] | None = None,
    min_p: Float[Array, " B"] | None = None,
) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
    """Of the tokens that `truncate` keeps the k most likely, of tied ones the first: their probabilities and ids.

    The most likely is the first; 0 and -1 stand where fewer are kept. k is at least top_k and at most V.
    """
    largest, ids = jax.lax.top_k(probs, k)
    tau = jnp.zeros_like(largest[:, :1])
    if top_k is not None:
        tau = jnp.take_along_axis(largest, jnp.minimum(top_k, k)[:, None] - 1, axis=-1)
    if top_p is not None:
        held = top_p[:, None] * _sum(jnp.where(probs >= tau, probs, 0.0))
        before = jnp.pad(jnp.cumsum(largest, axis=-1)[:, :-1], ((0, 0), (1, 0)))
        least = jnp.where(before < held, largest, jnp.inf).min(axis=-1, keepdims=True)
        tau = jnp.where(top_p[:, None] >= 1.0, tau, jnp.maximum(tau, least))
    if min_p is not None:
        tau = jnp.maximum(tau, min_p[:, None] * largest[:, :1])
    kept = jnp.where(largest >= tau, largest, 0.0)
    return kept, jnp.where(kept > 0, ids, -1)


def _below_top_k(probs: Probs, k: Column, count: Callable) -> Column:
    """A τ that at least k tokens reach. For k up to 64 the least of the maxima of 64 parts of the vocabulary."""
    maxima = _fold(probs, jnp.maximum, width=64)
    likely = 2.0**-20 * maxima.max(axis=-1, keepdims=True)
    low = jnp.where(k <= maxima.shape[-1], maxima.min(axis=-1, keepdims=True), likely)
    return jnp.where(count(low) >= k, low, 0.0)
