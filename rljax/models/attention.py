"""Attention: one rule of who sees whom, one function, and which implementation computes it.

A query sees the keys of its own segment (0 is padding) at positions up to its own; in a layer with a window of W
positions only the last W of them, its own included.

    xla      everywhere, and for caches
    cudnn    NVIDIA's flash attention: whole rows in half precision, no softcap
    splash   Pallas on TPU: whole rows of a multiple of 128 columns, each segment in consecutive columns, one device
"""

import math
from functools import reduce
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rljax.models.batch_invariant import BLOCK, LANE
from rljax.ops.logprobs import tree_sum

Implementation = Literal["auto", "xla", "cudnn", "splash"]
LANES = 128
FLOOR = -(2.0**100)


class Sight(NamedTuple):
    """Where queries and keys stand. Without keys of their own (a cache's) whole rows look at themselves.

    Keys come in parts, each (positions, segments) [R S]: R = B, or fewer, where B/R neighbouring rows share a row.
    """

    positions: Array  # [B T]
    segments: Array  # [B T], 0: padding
    keys: tuple[tuple[Array, Array], ...] | None = None

    def visible(self, window: int | None = None) -> list[Array]:
        """Which keys each query sees, part by part. bool [R T·B/R S]"""
        parts = ((self.positions, self.segments),) if self.keys is None else self.keys
        return [self._sees(*part, window) for part in parts]

    def _sees(self, positions, segments, window):
        rows = len(positions)
        own_positions, own_segments = (x.reshape(rows, -1) for x in (self.positions, self.segments))
        same = (own_segments[:, :, None] == segments[:, None, :]) & (own_segments[:, :, None] > 0)
        distance = own_positions[:, :, None] - positions[:, None, :]
        seen = same & (distance >= 0)
        return seen if window is None else seen & (distance < window)


def attend(
    query: Array,
    key: Array,
    value: Array,
    sight: Sight,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    implementation: Implementation = "auto",
    exact: bool = False,
) -> Array:
    """softmax(cap(scale · QKᵀ)) V, where cap(z) = c tanh(z/c); heads in groups that share keys; softmax in float32.

    Args: query [B T H K]; key, value [B T KV K] of the same rows. exact: by `blocks`, whatever the implementation. A
    query that sees nothing (padding) gets numbers, not NaN.
    """
    if exact:
        implementation = "xla"
    elif implementation == "auto":
        implementation = choose(jax.default_backend(), jax.device_count(), query.shape, query.dtype, softcap)
    if implementation == "cudnn":
        return cudnn(query, key, value, sight.visible(window)[0], scale)
    if implementation == "splash":
        return splash(query, key, value, sight.segments, scale, window, softcap)
    keys = [(jnp.moveaxis(key, 1, 3), jnp.moveaxis(value, 1, 2))]
    return look_up(query, keys, sight, scale, window, softcap, exact)


def look_up(
    query: Array,
    keys: list[tuple[Array, Array]],
    sight: Sight,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    exact: bool = False,
) -> Array:
    """`attend` to what a cache holds: key [R KV K S] and value [R KV S K] of each of the sight's parts.

    In this layout both products read a cache as it lies: on CPU a decode step of 64 rows took 0.4 of the time of
    [R S KV K] at 64 columns.
    """
    visible = sight.visible(window)
    if exact:
        return blocks(query, *keys[0], visible[0], scale, softcap)
    return dense(query, keys, visible, scale, softcap)


def choose(backend: str, devices: int, shape, dtype, softcap: float | None) -> Implementation:
    """What "auto" is on this backend, for queries of this shape [B T H K]."""
    half = dtype in (jnp.bfloat16, jnp.float16)
    if backend == "gpu" and half and softcap is None and shape[-1] % 8 == 0 and shape[-1] <= LANES:
        return "cudnn"
    # XLA cannot cut a Pallas kernel over devices by itself.
    if backend == "tpu" and devices == 1 and shape[1] % LANES == 0:
        return "splash"
    return "xla"


def dense(query, keys: list[tuple[Array, Array]], visible: list[Array], scale: float, softcap: float | None):
    """By einsum, one softmax over the keys of all parts."""
    scores = [_scores(query, key, seen, scale, softcap) for (key, _), seen in zip(keys, visible, strict=True)]
    shares = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(query.dtype)
    ends = np.cumsum([key.shape[-1] for key, _ in keys])[:-1]
    parts = zip(jnp.split(shares, ends, axis=-1), keys, strict=True)
    return sum(_mixed(share, value) for share, (_, value) in parts).reshape(query.shape)


def _scores(query, key, visible, scale: float, softcap: float | None):
    """Float32 [B KV H/KV T S], hidden keys at a finite floor: a padding query sees nothing, and must give numbers."""
    (B, T, H, K), (R, kv_heads, _, S) = query.shape, key.shape
    group = H // kv_heads
    grouped = query.reshape(R, B // R * T, kv_heads, group, K).transpose(0, 2, 3, 1, 4)  # [R KV G q K]
    flat = grouped.reshape(R, kv_heads, -1, K)
    scores = jnp.matmul(flat, key, preferred_element_type=jnp.float32).reshape(*grouped.shape[:4], S) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible[:, None, None], scores, FLOOR)
    if R == B:
        return scores
    return jnp.moveaxis(scores.reshape(R, kv_heads, group, B // R, T, S), 3, 1).reshape(B, kv_heads, group, T, S)


def _mixed(shares, value):
    """[B KV H/KV T S] of values [R KV S K]: [B T KV H/KV K]"""
    (B, kv_heads, group, T, S), (R, _, _, K) = shares.shape, value.shape
    if R != B:
        shares = jnp.moveaxis(shares.reshape(R, B // R, kv_heads, group, T, S), 1, 3)
    out = jnp.matmul(shares.reshape(R, kv_heads, -1, S), value).reshape(R, kv_heads, group, -1, K)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, kv_heads, group, K)


def blocks(query, key, value, visible, scale: float, softcap: float | None):
    """The same bits for a query alone or among others, however many empty columns follow: keys in blocks of BLOCK.

    Within a block every product is small enough to be added in one order whatever the number of queries, where that
    is a multiple of LANE, or less and heads are no wider than BLOCK; blocks are added one after the other; hidden
    columns and blocks add zeros. The maximum loses its last bit for the reason given in `ops.logprobs.log_sum_exp`.
    """
    T, group = query.shape[1], query.shape[2] // key.shape[1]
    few = T * group <= LANE and query.shape[3] <= BLOCK
    more, extra = 0 if few else -T % (LANE // math.gcd(LANE, group)), -key.shape[3] % BLOCK
    query = jnp.pad(query, ((0, 0), (0, more), (0, 0), (0, 0)))
    key = jnp.pad(key, ((0, 0), (0, 0), (0, 0), (0, extra)))
    value = jnp.pad(value, ((0, 0), (0, 0), (0, extra), (0, 0)))
    visible = jnp.pad(visible, ((0, 0), (0, more), (0, extra)))
    cut = [slice(start, start + BLOCK) for start in range(0, key.shape[3], BLOCK)]
    scores = [_scores(query, key[..., part], visible[:, :, part], scale, softcap) for part in cut]
    top = jax.lax.stop_gradient(reduce(jnp.maximum, [score.max(axis=-1, keepdims=True) for score in scores]))
    top = jax.lax.reduce_precision(top, exponent_bits=8, mantissa_bits=22)
    shares = [jnp.exp(score - top) for score in scores]
    total = reduce(jnp.add, [tree_sum(share) for share in shares])
    mixed = [_mixed(share.astype(query.dtype), value[:, :, part]) for share, part in zip(shares, cut, strict=True)]
    out = reduce(jnp.add, mixed) / jnp.moveaxis(total, 3, 1)[..., None].astype(query.dtype)
    return out.reshape(query.shape)[:, :T]


def cudnn(query, key, value, visible, scale: float):
    """By NVIDIA's flash attention, which takes a mask for even lengths only: one column is added to others."""
    odd = query.shape[1] % 2
    longer = lambda x: jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0)))  # noqa: E731
    mask = jnp.pad(visible, ((0, 0), (0, odd), (0, odd)))[:, None]
    arrays = (longer(x) for x in (query, key, value))
    out = jax.nn.dot_product_attention(*arrays, mask=mask, scale=scale, implementation="cudnn")
    return out[:, : query.shape[1]]


def splash(query, key, value, segments, scale: float, window: int | None, softcap: float | None, interpret=False):
    """By JAX's splash attention. Padding looks at padding. `interpret`: without a TPU, slowly."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    B, T, H, K = query.shape
    kv_heads = key.shape[2]
    causal = masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
    kernel = kernels.make_splash_mqa_single_device(
        masks.MultiHeadMask([causal] * (H // kv_heads)), attn_logits_soft_cap=softcap, interpret=interpret
    )
    widen = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -K % LANES)))  # noqa: E731
    by_head = lambda x: jnp.moveaxis(widen(x), 1, 2)  # noqa: E731
    queries = by_head((query * scale).astype(query.dtype)).reshape(B, kv_heads, H // kv_heads, T, -1)
    of_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    out = jax.vmap(of_heads)(queries, by_head(key), by_head(value), kernels.SegmentIds(segments, segments))
    return jnp.moveaxis(out.reshape(B, H, T, -1)[..., :K], 1, 2).astype(query.dtype)
