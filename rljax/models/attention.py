"""Attention: one rule of who sees whom, one function, and which implementation computes it.

A query sees the keys of its own segment (0 is padding) at positions up to its own; in a layer with a window of W
positions only the last W of them, its own included.

    xla      everywhere, and the only one that reads a cache
    cudnn    NVIDIA's flash attention: whole rows in half precision, no softcap
    splash   Pallas on TPU: whole rows of a multiple of 128 columns, each segment in consecutive columns, one device
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Implementation = Literal["auto", "xla", "cudnn", "splash"]
LANES = 128


class Sight(NamedTuple):
    """Where queries and keys stand. Without keys of their own (a cache's) whole rows look at themselves."""

    positions: Array  # [B T]
    segments: Array  # [B T], 0: padding
    key_positions: Array | None = None  # [B S]
    key_segments: Array | None = None  # [B S]

    def visible(self, window: int | None = None) -> Array:
        """Which keys each query sees. bool [B T S]"""
        own = self.key_segments is None
        positions, segments = (self.positions, self.segments) if own else (self.key_positions, self.key_segments)
        same = (self.segments[:, :, None] == segments[:, None, :]) & (self.segments[:, :, None] > 0)
        distance = self.positions[:, :, None] - positions[:, None, :]
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
) -> Array:
    """softmax(cap(scale · QKᵀ)) V, where cap(z) = c tanh(z/c); heads in groups that share keys; softmax in float32.

    Args: query [B T H K]; key, value [B S KV K]. A query that sees nothing (padding) gets numbers, not NaN.
    """
    if implementation == "auto":
        implementation = choose(jax.default_backend(), jax.device_count(), query.shape, query.dtype, sight, softcap)
    if implementation == "cudnn":
        return cudnn(query, key, value, sight.visible(window), scale)
    if implementation == "splash":
        return splash(query, key, value, sight.segments, scale, window, softcap)
    return dense(query, key, value, sight.visible(window), scale, softcap)


def choose(backend: str, devices: int, shape, dtype, sight: Sight, softcap: float | None) -> Implementation:
    """What "auto" is on this backend, for queries of this shape [B T H K]."""
    whole, half = sight.key_segments is None, dtype in (jnp.bfloat16, jnp.float16)
    if backend == "gpu" and whole and half and softcap is None and shape[-1] % 8 == 0 and shape[-1] <= LANES:
        return "cudnn"
    # XLA cannot cut a Pallas kernel over devices by itself.
    if backend == "tpu" and whole and devices == 1 and shape[1] % LANES == 0:
        return "splash"
    return "xla"


def dense(query, key, value, visible, scale: float, softcap: float | None):
    """By einsum. visible: bool [B T S]."""
    B, T, H, K = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(B, T, kv_heads, H // kv_heads, K)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    # A finite floor: a padding query sees nothing, and must still give numbers.
    shares = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -1e30), axis=-1).astype(query.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", shares, value).reshape(B, T, H, K)


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
