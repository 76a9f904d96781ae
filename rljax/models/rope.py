"""Rotary positions (RoFormer, arXiv:2104.09864) and the ways they are stretched over longer contexts.

Pair i of a head's dimensions is turned by position · frequencies[i]. Every stretching is another table of frequencies,
so the decoder knows only tables; they are computed here, once, from the fields of a config.json. Tables are made in
float32, operation by operation as transformers makes them: at position 8,192 one unit in the last place of a frequency
turns a pair by 4e-4 radians.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

f32 = np.float32


@dataclasses.dataclass(frozen=True)
class Rope:
    """Radians a position, one per rotated pair; dimensions beyond them are left alone. `scale`: of cosine and sine."""

    frequencies: tuple[float, ...]
    scale: float = 1.0


def turns(positions, rope: Rope):
    """Cosine and sine of each pair at each position: 2 x [B T 1 pairs], the same for all layers of one table.

    The product with the identity changes nothing: it is what keeps XLA's CPU backend from computing them again for each
    head of each layer, inside the loops that use them.
    """
    angle = positions[..., None].astype(jnp.float32) * jnp.asarray(rope.frequencies, jnp.float32)[None, None]
    same = jnp.eye(len(rope.frequencies))
    pairs = (jnp.matmul(rope.scale * turn(angle), same, precision="highest") for turn in (jnp.cos, jnp.sin))
    return tuple(pair[..., None, :] for pair in pairs)


def rotate(x, turns):
    """x [B T H K] turned; dimension i is paired with i + K/2 (Hugging Face's convention)."""
    cos, sin = turns
    half = cos.shape[-1]
    first, second = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if 2 * half == x.shape[-1] else jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)


def default(theta: float, dim: int) -> Rope:
    """θ^(-2i/dim), i = 0 … dim/2 - 1."""
    return Rope(_table(f32(1) / _periods(theta, dim)))


def from_parameters(parameters: dict, head_dim: int, max_positions: int, context: int | None) -> Rope:
    """The table of a config.json's `rope_parameters`. Raises ValueError on a `rope_type` that is not here.

    `context`: the longest text there will be; only longrope asks. Its tables for short and for long texts differ, and
    one of them must serve all: transformers takes the one of the longest row of each batch, so that a token's log-prob
    depends on its neighbours.
    """
    kind, dim = parameters.get("rope_type", "default"), int(head_dim * (parameters.get("partial_rotary_factor") or 1.0))
    if kind not in STRETCHED:
        raise ValueError(f"rope_type is {kind!r}; legal: {', '.join(map(repr, STRETCHED))}")
    return STRETCHED[kind](parameters, _periods(parameters["rope_theta"], dim), max_positions, context)


def _periods(theta: float, dim: int) -> np.ndarray:
    exponents = np.arange(0, dim, 2, dtype=f32) / f32(dim)
    return (np.float64(theta) ** exponents.astype(np.float64)).astype(f32)


def _table(frequencies: np.ndarray) -> tuple[float, ...]:
    return tuple(frequencies.astype(f32).tolist())


def _default(p: dict, periods, max_positions, context) -> Rope:
    return Rope(_table(f32(1) / periods))


def _linear(p: dict, periods, max_positions, context) -> Rope:
    """Positions divided by the factor (arXiv:2306.15595)."""
    return Rope(_table(f32(1) / periods / f32(p["factor"])))


def _llama3(p: dict, periods, max_positions, context) -> Rope:
    """Long waves divided by the factor, short ones kept, blended between (Llama 3.1's)."""
    factor, low, high = (p[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    original, kept = p["original_max_position_embeddings"], f32(1) / periods
    waves = f32(2 * math.pi) / kept
    divided = np.where(waves > original / low, kept / f32(factor), kept)
    share = (f32(original) / waves - f32(low)) / f32(high - low)
    blended = (f32(1) - share) * divided / f32(factor) + share * divided
    between = (waves >= original / high) & (waves <= original / low)
    return Rope(_table(np.where(between, blended, divided)))


def _yarn(p: dict, periods, max_positions, context) -> Rope:
    """YaRN (arXiv:2309.00071): divided below beta_slow turns in the original context, kept above beta_fast, a ramp
    between; cosine and sine times 0.1 ln(factor) + 1."""
    original = p["original_max_position_embeddings"]
    factor = p["factor"] or max_positions / original
    dim, log_theta = 2 * len(periods), math.log(p["rope_theta"])

    def pair(turns):  # the pair that turns so often in the original context
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * log_theta)

    low, high = pair(p.get("beta_fast") or 32), pair(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (np.arange(dim // 2, dtype=f32) - f32(low)) / f32((high - low) or 0.001)
    kept = f32(1) - np.clip(ramp, f32(0), f32(1))
    frequencies = f32(1) / (f32(factor) * periods) * (f32(1) - kept) + f32(1) / periods * kept

    def mscale(weight):
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale = p.get("attention_factor")
    if scale is None:
        over, under = p.get("mscale"), p.get("mscale_all_dim")
        scale = mscale(over) / mscale(under) if over and under else mscale(1)
    return Rope(_table(frequencies), float(scale))


def _longrope(p: dict, periods, max_positions, context) -> Rope:
    """LongRoPE (arXiv:2402.13753): a divisor of its own for each pair, one list for short contexts and one for long."""
    original = p["original_max_position_embeddings"]
    factor = p.get("factor") or max_positions / original
    scale = p.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    divisors = np.asarray(p["long_factor"] if (context or 0) > original else p["short_factor"], f32)
    return Rope(_table(f32(1) / (divisors * periods)), float(scale))


STRETCHED = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
