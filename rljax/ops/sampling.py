"""Drawing tokens: one uniform number a row, inverted through the cumulative distribution.

The uniform of a token depends on (seed, step, prompt, sample, position) alone, so the same sample comes out whatever
the batch split or the mesh. Nothing is sorted: thresholds are found by bisection over the bit patterns of the
probabilities, which is exact and some forty times cheaper than a sort on a CPU.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

Probs = Float[Array, "B V"]
Rows = Float[Array, "B 1"]


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


def masses(logits: Float[Array, "B V"], temperature: Float[Array, " B"]) -> Probs:
    """e^(z/τ - max z/τ): the probabilities up to a factor a row, the most likely token's being 1.

    The same operations as in `logprobs.chosen_logp`'s log-sum-exp: where both are asked for, they are computed once.
    """
    scaled = logits / temperature[:, None]
    top = scaled.max(axis=-1, keepdims=True)
    return jnp.exp(scaled - jnp.where(jnp.isfinite(top), top, 0.0))


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
    """First entry with mass whose cdf is above the target; where rounding leaves none, the last entry with mass.

    XLA adds long prefixes as a tree: a computed cdf may rise at an entry without mass, or fall.
    """
    N = mass.shape[-1]
    place, held = jnp.arange(N)[None], mass > 0
    first = jnp.where(held & (cdf > target[:, None]), place, N).min(axis=-1)
    last = jnp.where(held, place, 0).max(axis=-1)
    return jnp.where(first < N, first, last)


def _below(uniform, total):
    """u · Σp, and less than Σp."""
    return jnp.minimum(uniform * total, jnp.nextafter(total, 0.0))


def _threshold(probs: Probs, target: Rows, low: Rows, reached, share) -> Rows:
    """A τ with {p >= τ} the smallest such set whose `reached` is at least `target`.

    Non-negative floats sort as their bit patterns do. The interval of patterns that holds τ is cut where the logarithm
    of what is reached, taken as linear in the pattern, meets the target, until the set would miss its target with one
    token less, or one pattern is left (tied tokens). An end that stays twice counts half (Illinois; Dowell & Jarratt
    1971), so that both ends close in.

    Args:
      low: a τ at which the target is reached.
      reached: set (bool [B V]) -> [B 1], how many tokens or how much mass.
      share: τ -> the least that a token of {p >= τ} adds to it.
    """
    bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.int32)  # noqa: E731
    float_of = lambda x: jax.lax.bitcast_convert_type(x, jnp.float32)  # noqa: E731

    def over(at, low):
        """How far a set is above the target and half a token, in logs."""
        return jnp.log(jnp.maximum(at, 1e-3 * target)) - jnp.log(target + 0.5 * share(float_of(low)))

    def unsettled(low, high, at_low):
        return (high - low > 1) & (at_low - share(float_of(low)) >= target)

    def cut(state):
        (low, high, at_low), (over_low, over_high), stayed = state
        part = jnp.clip(over_low / jnp.maximum(over_low - over_high, 1e-9), 0.02, 0.98)
        middle = low + (part * (high - low).astype(jnp.float32)).astype(jnp.int32)
        middle = jnp.clip(middle, low + 1, jnp.maximum(high - 1, low + 1))
        at_middle = reached(probs >= float_of(middle))
        going, enough = unsettled(low, high, at_low), at_middle >= target
        up, down = going & enough, going & ~enough
        over_middle = over(at_middle, low)
        over_low = jnp.where(up, jnp.maximum(over_middle, 1e-6), jnp.where(down & (stayed > 0), 0.5, 1.0) * over_low)
        over_high = jnp.where(down, jnp.minimum(over_middle, -1e-6), jnp.where(up & (stayed < 0), 0.5, 1.0) * over_high)
        ends = jnp.where(up, middle, low), jnp.where(down, middle, high), jnp.where(up, at_middle, at_low)
        return ends, (over_low, over_high), jnp.where(up, -1, jnp.where(down, 1, stayed))

    low, high = bits(low), bits(probs.max(axis=-1, keepdims=True)) + 1
    at_low = reached(probs >= float_of(low))
    start = (low, high, at_low), (jnp.maximum(over(at_low, low), 1e-6), over(jnp.zeros_like(at_low), low))
    (low, *_), *_ = jax.lax.while_loop(lambda state: unsettled(*state[0]).any(), cut, (*start, jnp.zeros_like(low)))
    return float_of(low)


def truncate(
    probs: Probs,
    top_k: Int[Array, " B"] | None = None,
    top_p: Float[Array, " B"] | None = None,
    min_p: Float[Array, " B"] | None = None,
) -> Probs:
    """Set to 0 what the filters exclude; not renormalised. Tokens tied at a threshold stay together. `probs` need not
    sum to one.

    top_k keeps the k most likely tokens; top_p the fewest most likely ones that hold at least the share p of what top_k
    left; min_p those with p(v) >= min_p · max p. They are applied in that order, as transformers does.
    """
    top = probs.max(axis=-1, keepdims=True)
    tau = jnp.zeros_like(top)
    if top_k is not None:
        count = lambda kept: kept.astype(jnp.float32).sum(axis=-1, keepdims=True)  # noqa: E731
        few = jnp.minimum(top_k, probs.shape[-1])[:, None].astype(jnp.float32)
        likely = top * 2.0**-20
        low = jnp.where(count(probs >= likely) >= few, likely, 0.0)
        tau = _threshold(probs, few, low, count, jnp.ones_like)
        probs = jnp.where(probs >= tau, probs, 0.0)
    if top_p is not None:
        mass = lambda kept: jnp.where(kept, probs, 0.0).sum(axis=-1, keepdims=True)  # noqa: E731
        total = probs.sum(axis=-1, keepdims=True)
        held = top_p[:, None] * total
        # Tokens below τ hold what is left over, and each less than τ.
        least = 0.99 * jnp.maximum(total - held, 0.0) / probs.shape[-1]
        tau = _threshold(probs, held, jnp.maximum(least, tau), mass, lambda tau: tau)
        probs = jnp.where((probs >= tau) | (top_p[:, None] >= 1.0), probs, 0.0)
    if min_p is not None:
        probs = jnp.where(probs >= min_p[:, None] * top, probs, 0.0)
    return probs
