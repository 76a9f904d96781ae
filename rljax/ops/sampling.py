"""Drawing tokens: one uniform number a row, inverted through the cumulative distribution.

The uniform of a token depends on (seed, step, prompt, sample, position) alone, so the same sample comes out whatever
the batch split or the mesh. Nothing is sorted: thresholds are found by bisection over the bit patterns of the
probabilities, which is exact and some forty times cheaper than a sort on a CPU.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

Probs = Float[Array, "B V"]


def row_keys(seed: Int[Array, ""], step: Int[Array, "*#B"], prompt: Int[Array, " B"], sample: Int[Array, " B"]):
    """One key per row: fold_in(seed, step, prompt, sample). [B]"""
    fold = jax.vmap(jax.random.fold_in)
    base = fold(jnp.broadcast_to(jax.random.key(seed), prompt.shape), jnp.broadcast_to(step, prompt.shape))
    return fold(fold(base, prompt), sample)


def token_uniforms(keys: Key[Array, " B"], position: Int[Array, "*#B"]) -> Float[Array, " B"]:
    """The number in [0, 1) that draws the token at `position` (of each row, or of all) of each row's answer."""
    return jax.vmap(lambda key, p: jax.random.uniform(jax.random.fold_in(key, p)))(
        keys, jnp.broadcast_to(position, keys.shape)
    )


def argmax(x: Float[Array, "*N V"]) -> Int[Array, "*N"]:
    """First index of the maximum, as a max and a min: jnp.argmax is several times slower on a CPU."""
    V = x.shape[-1]
    places = jnp.where(x == x.max(axis=-1, keepdims=True), jnp.arange(V).reshape((1,) * (x.ndim - 1) + (V,)), V)
    return places.min(axis=-1)


def invert_cdf(probs: Probs, uniform: Float[Array, " B"], block: int = 128) -> Int[Array, " B"]:
    """The token v with cdf(v - 1) <= u · Σp < cdf(v), found in two levels: among blocks, then inside one.

    Tokens of probability 0 are never drawn. `probs` need not sum to one.
    """
    B, V = probs.shape
    blocks = -(-V // block)
    table = jnp.pad(probs, ((0, 0), (0, blocks * block - V))).reshape(B, blocks, block)
    upper = jnp.cumsum(table.sum(axis=-1), axis=-1)
    target = jnp.minimum(uniform * upper[:, -1], jnp.nextafter(upper[:, -1], 0.0))
    where = _crossing(table.sum(axis=-1), upper, target)
    inside = jnp.take_along_axis(table, where[:, None, None], axis=1)[:, 0]
    below = jnp.take_along_axis(jnp.pad(upper, ((0, 0), (1, 0))), where[:, None], axis=1)
    return where * block + _crossing(inside, below + jnp.cumsum(inside, axis=-1), target)


def _crossing(mass: Float[Array, "B N"], cdf: Float[Array, "B N"], target: Float[Array, " B"]) -> Int[Array, " B"]:
    """First entry with mass whose cdf is above the target; where rounding leaves none, the last entry with mass.

    XLA adds long prefixes as a tree: a computed cdf may rise at an entry without mass, or fall.
    """
    above = (mass > 0) & (cdf > target[:, None])
    first = argmax(above.astype(jnp.float32))
    last = mass.shape[-1] - 1 - argmax((mass > 0)[:, ::-1].astype(jnp.float32))
    return jnp.where(above.any(axis=-1), first, last)


def _largest_threshold(probs: Probs, enough) -> Float[Array, "B 1"]:
    """Largest τ for which enough(p >= τ) still holds, exactly: non-negative floats sort as their bit patterns do."""
    low = jnp.zeros((probs.shape[0], 1), jnp.int32)
    high = jnp.full_like(low, 0x7F800000)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        holds = enough(probs >= jax.lax.bitcast_convert_type(middle, jnp.float32))
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def truncate(
    probs: Probs,
    top_k: Int[Array, " B"] | None = None,
    top_p: Float[Array, " B"] | None = None,
    min_p: Float[Array, " B"] | None = None,
) -> Probs:
    """Set to 0 what the filters exclude; not renormalised. Tokens tied at a threshold stay together.

    top_k keeps the k most likely tokens; top_p the fewest most likely ones that hold at least the share p of what top_k
    left; min_p those with p(v) >= min_p · max p. They are applied in that order, as transformers does.
    """
    top = probs.max(axis=-1, keepdims=True)
    if top_k is not None:
        tau = _largest_threshold(probs, lambda keep: keep.sum(axis=-1, keepdims=True) >= top_k[:, None])
        probs = jnp.where(probs >= tau, probs, 0.0)
    if top_p is not None:
        mass = top_p[:, None] * probs.sum(axis=-1, keepdims=True)
        tau = _largest_threshold(probs, lambda keep: jnp.where(keep, probs, 0.0).sum(axis=-1, keepdims=True) >= mass)
        probs = jnp.where((probs >= tau) | (top_p[:, None] >= 1.0), probs, 0.0)
    if min_p is not None:
        probs = jnp.where(probs >= min_p[:, None] * top, probs, 0.0)
    return probs
