"""Rotary position embeddings (RoPE; RoFormer, arXiv:2104.09864) and their scaling to longer contexts.

Pair i of a head's dimensions is rotated by position · frequencies[i]. Every kind of scaling is another table of
frequencies, computed here from the fields of a config.json, so the decoder knows only tables. They are computed in
float32, operation by operation as in transformers: at position 8,192 one unit in the last place of a frequency rotates
a pair by 4e-4 radians.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

f32 = np.float32


@dataclasses.dataclass(frozen=True)
class Rope:
    """A table of frequencies. Dimensions of a head beyond its pairs are not rotated."""

    frequencies: tuple[float, ...]  # radians a position, one for each rotated pair
    scale: float = 1.0  # of cosine and sine


def cos_sin(
    positions: Int[Array, "B T"], rope: Rope
) -> tuple[Float[Array, "B T 1 pairs"], Float[Array, "B T 1 pairs"]]:
    """Cosine and sine of each pair at each position, the same for all layers of one table.

    The product with the identity matrix changes no number: it keeps XLA's CPU backend from computing sines and cosines
    again for each head of each layer, inside the loops that use them.
    """
    angle = positions[..., None].astype(jnp.float32) * jnp.asarray(rope.frequencies, jnp.float32)[None, None]
    identity = jnp.eye(len(rope.frequencies))
    cos = jnp.matmul(rope.scale * jnp.cos(angle), identity, precision="highest")
    sin = jnp.matmul(rope.scale * jnp.sin(angle), identity, precision="highest")
    return cos[..., None, :], sin[..., None, :]


def apply_rope(
    x: Float[Array, "B T H K"], cos: Float[Array, "B T 1 pairs"], sin: Float[Array, "B T 1 pairs"]
) -> Float[Array, "B T H K"]:
    """x rotated; dimension i is paired with i + pairs (Hugging Face's convention)."""
    pairs = cos.shape[-1]
    first = x[..., :pairs].astype(jnp.float32)
    second = x[..., pairs : 2 * pairs].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    if 2 * pairs == x.shape[-1]:
        return rotated
    return jnp.concatenate([rotated, x[..., 2 * pairs :]], axis=-1)


def default(theta: float, dim: int) -> Rope:
    """θ^(-2i/dim), i = 0 … dim/2 - 1."""
    return Rope(_table(f32(1) / _periods(theta, dim)))


def from_parameters(parameters: dict, head_dim: int, max_positions: int, context: int | None) -> Rope:
    """The table of a config.json's `rope_parameters`. Raises ValueError for an unknown `rope_type`.

    `context` is the length of the longest text; only longrope uses it. It has one table for short and one for long
    texts, and one of them must serve all: transformers chooses by the longest row of each batch, so that a token's
    log-prob depends on the other rows.
    """
    kind = parameters.get("rope_type", "default")
    dim = int(head_dim * (parameters.get("partial_rotary_factor") or 1.0))
    if kind not in SCALINGS:
        raise ValueError(f"rope_type is {kind!r}; legal: {', '.join(map(repr, SCALINGS))}")
    return SCALINGS[kind](parameters, _periods(parameters["rope_theta"], dim), max_positions, context)


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
    """Low frequencies divided by the factor, high ones kept, interpolated between (Llama 3.1's)."""
    factor = p["factor"]
    low = p["low_freq_factor"]
    high = p["high_freq_factor"]
    original = p["original_max_position_embeddings"]
    unscaled = f32(1) / periods
    wavelengths = f32(2 * math.pi) / unscaled
    divided = np.where(wavelengths > original / low, unscaled / f32(factor), unscaled)
    smooth = (f32(original) / wavelengths - f32(low)) / f32(high - low)
    interpolated = (f32(1) - smooth) * divided / f32(factor) + smooth * divided
    is_medium = (wavelengths >= original / high) & (wavelengths <= original / low)
    return Rope(_table(np.where(is_medium, interpolated, divided)))


def _yarn(p: dict, periods, max_positions, context) -> Rope:
    """YaRN (arXiv:2309.00071): frequencies below beta_slow rotations in the original context are divided by the factor,
    those above beta_fast kept, with a linear ramp between; cosine and sine are scaled by 0.1 ln(factor) + 1."""
    original = p["original_max_position_embeddings"]
    factor = p["factor"] or max_positions / original
    dim = 2 * len(periods)
    log_theta = math.log(p["rope_theta"])

    def pair_of(rotations):
        """The pair that makes so many rotations in the original context."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * log_theta)

    low = pair_of(p.get("beta_fast") or 32)
    high = pair_of(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, dim - 1)
    ramp = (np.arange(dim // 2, dtype=f32) - f32(low)) / f32((high - low) or 0.001)
    extrapolation = f32(1) - np.clip(ramp, f32(0), f32(1))
    frequencies = f32(1) / (f32(factor) * periods) * (f32(1) - extrapolation) + f32(1) / periods * extrapolation

    def mscale(weight):
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    scale = p.get("attention_factor")
    if scale is None:
        numerator = p.get("mscale")
        denominator = p.get("mscale_all_dim")
        scale = mscale(numerator) / mscale(denominator) if numerator and denominator else mscale(1)
    return Rope(_table(frequencies), float(scale))


def _longrope(p: dict, periods, max_positions, context) -> Rope:
    """LongRoPE (arXiv:2402.13753): a divisor for each pair, one list for short contexts and one for long."""
    original = p["original_max_position_embeddings"]
    factor = p.get("factor") or max_positions / original
    scale = p.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    divisors = np.asarray(p["long_factor"] if (context or 0) > original else p["short_factor"], f32)
    return Rope(_table(f32(1) / (divisors * periods)), float(scale))


SCALINGS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
