"""Attention: one masking rule, one function, and the choice between implementations.

A query attends to the keys of its own segment (segment 0 is padding) and of the segment that this one continues, at
positions up to its own; in a layer with a sliding window of W positions only to the last W of them, its own included.

    xla      everywhere, and for caches
    cudnn    NVIDIA's flash attention (A100 and later): whole rows in half precision, no softcap
    splash   Pallas on TPU: whole rows, each segment contiguous and none continued; on a mesh each device attends for
             its rows and heads, where these divide and columns are whole

Whole rows are those of scoring and update, and prompts that are read into an empty cache.
"""

import re
from collections.abc import Callable
from functools import partial, reduce
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, Shaped

from rljax.models.batch_invariant import BLOCK, LANE, join_tiles, pad_axis, split_tiles
from rljax.models.partition import num_shards
from rljax.ops.logprobs import tree_sum

Implementation = Literal["auto", "xla", "cudnn", "splash"]
TPU_LANES = 128  # splash attention takes heads and numbers of columns that are multiples of this
CUDNN_CAPABILITY = 8  # compute capability of an A100, the first for which cuDNN has flash attention
CUDNN_HEAD_DIM = 128  # the widest heads that it takes there; an H100 takes 256
MASK_VALUE = -(2.0**100)  # finite: the softmax of a padding query, which attends to nothing, is then not NaN


class AttentionMask(NamedTuple):
    """Positions and segments of queries and keys. Where `keys` is None, the keys are the queries' own tokens.

    Keys may come in several parts (a shared prefix and a row's own columns), each (positions, segments) [R S]: R = B,
    or fewer, where each group of B/R neighboring rows shares a row of keys.
    """

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]  # 0: padding
    keys: tuple[tuple[Array, Array], ...] | None = None
    context: Int[Array, "B T"] | None = None  # the segment that each one continues; 0: none

    def visible(self, window: int | None = None) -> list[Array]:
        """For each part of the keys, which of them each query attends to. bool [R T·B/R S]"""
        parts = ((self.positions, self.segments),) if self.keys is None else self.keys
        return [self._visible_part(positions, segments, window) for positions, segments in parts]

    def _visible_part(self, positions, segments, window: int | None):
        rows = len(positions)
        own_positions = self.positions.reshape(rows, -1)
        own_segments = self.segments.reshape(rows, -1)
        same = (own_segments[:, :, None] == segments[:, None, :]) & (own_segments[:, :, None] > 0)
        if self.context is not None:
            context = self.context.reshape(rows, -1, 1)
            same |= (context == segments[:, None, :]) & (context > 0)
        distance = own_positions[:, :, None] - positions[:, None, :]
        causal = same & (distance >= 0)
        if window is None:
            return causal
        return causal & (distance < window)


class SharedPrefixMask(NamedTuple):
    """The mask of rows [P L+n·T]: prefixes of L columns, each followed by the n rows of T columns that continue it."""

    prefix: AttentionMask  # [P L]
    rows: AttentionMask  # [P·n T], whose keys are the L of their prefix and then their own

    @classmethod
    def join(cls, prefix: AttentionMask, rows: AttentionMask) -> "SharedPrefixMask":
        """The mask of rows that attend to their prefix and to themselves."""
        n = len(rows.positions) // len(prefix.positions)
        positions = join_prefix_columns(prefix.positions, rows.positions, n)
        segments = join_prefix_columns(prefix.segments, rows.segments, n)
        return cls(prefix, rows._replace(keys=((positions, segments),)))

    def split(self, x: Shaped[Array, "P L+nT ..."]) -> tuple[Array, Array]:
        """Columns of the prefixes [P L ...] and of the rows [P·n T ...]."""
        L = self.prefix.positions.shape[1]
        return x[:, :L], x[:, L:].reshape(*self.rows.positions.shape, *x.shape[2:])


def join_prefix_columns(prefix: Shaped[Array, "P L ..."], rows: Shaped[Array, "B T ..."], n: int) -> Array:
    """[B L+T ...]: each row after a copy of its prefix."""
    return jnp.concatenate([jnp.repeat(prefix, n, axis=0), rows], axis=1)


def flatten_groups(prefix: Shaped[Array, "P L ..."], rows: Shaped[Array, "B T ..."]) -> Array:
    """[P L+n·T ...]: each prefix once, followed by the n = B/P rows that continue it."""
    return jnp.concatenate([prefix, rows.reshape(len(prefix), -1, *rows.shape[2:])], axis=1)


def attend(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T KV K"],
    value: Float[Array, "B T KV K"],
    mask: AttentionMask | SharedPrefixMask,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    implementation: Implementation = "auto",
    batch_invariant: bool = False,
    sharding: NamedSharding | None = None,
) -> Float[Array, "B T H K"]:
    """softmax(cap(scale · QKᵀ)) V, where cap(z) = c tanh(z/c); grouped-query heads; softmax in float32.

    A query that attends to nothing (padding) gets finite numbers, not NaN.

    Args:
      batch_invariant: use `blockwise_attention`, whatever the implementation.
      sharding: of hidden states [B T D] on a mesh.
    """
    if isinstance(mask, SharedPrefixMask):
        settings = (scale, window, softcap, implementation, batch_invariant, sharding)
        return attend_after_prefix(query, key, value, mask, *settings)
    if batch_invariant:
        implementation = "xla"
    elif implementation == "auto":
        kernel = flash_kernel(jax.local_devices()[0] if sharding is None else sharding.mesh.devices.flat[0])
        can_cut = mask.context is None and divides_over(sharding, len(query), key.shape[2])
        implementation = choose_implementation(kernel, can_cut, query.shape[3], query.dtype, softcap)
    if implementation == "cudnn":
        return cudnn_attention(query, key, value, mask.visible(window)[0], scale)
    if implementation == "splash":
        return splash_attention(query, key, value, mask, scale, window, softcap, sharding)
    keys_values = [(jnp.moveaxis(key, 1, 3), jnp.moveaxis(value, 1, 2))]
    return attend_cached(query, keys_values, mask, scale, window, softcap, batch_invariant)


def attend_after_prefix(
    query: Float[Array, "P C H K"],
    key: Float[Array, "P C KV K"],
    value: Float[Array, "P C KV K"],
    mask: SharedPrefixMask,
    *settings,
) -> Float[Array, "P C H K"]:
    """`attend` for rows [P C], C = L + n·T, that hold a prefix and the n rows which continue it.

    Keys and values of a prefix are computed once; each of its rows attends to a copy of them.
    """
    prefix_query, row_query = mask.split(query)
    prefix_key, row_key = mask.split(key)
    prefix_value, row_value = mask.split(value)
    n = len(row_query) // len(prefix_query)
    keys = join_prefix_columns(prefix_key, row_key, n)
    values = join_prefix_columns(prefix_value, row_value, n)
    prefix_out = attend(prefix_query, prefix_key, prefix_value, mask.prefix, *settings)
    row_out = attend(row_query, keys, values, mask.rows, *settings)
    return flatten_groups(prefix_out, row_out)


def attend_cached(
    query: Float[Array, "B T H K"],
    keys_values: list[tuple[Array, Array]],
    mask: AttentionMask,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    batch_invariant: bool = False,
) -> Float[Array, "B T H K"]:
    """`attend` to the keys of a cache: (key [R KV K S], value [R KV S K]) for each part of the mask's keys.

    In this layout both matmuls read the cache without transposing it: on CPU a decode step of 64 rows took 0.4 of the
    time that it took with [R S KV K], at 64 columns.
    """
    visible = mask.visible(window)
    if batch_invariant:
        key, value = keys_values[0]
        return blockwise_attention(query, key, value, visible[0], scale, softcap)
    return dot_product_attention(query, keys_values, visible, scale, softcap)


def flash_kernel(device: jax.Device) -> Implementation:
    """The flash attention that this device has; "xla": none is used (CPUs, AMD's GPUs, NVIDIA's before the A100)."""
    if device.platform == "tpu":
        return "splash"
    version = re.fullmatch(r"(\d+)\.\d+", str(getattr(device, "compute_capability", "")))  # AMD's are words
    if device.platform == "gpu" and version is not None and int(version[1]) >= CUDNN_CAPABILITY:
        return "cudnn"
    return "xla"


def choose_implementation(
    kernel: Implementation, can_cut: bool, head_dim: int, dtype, softcap: float | None
) -> Implementation:
    """What "auto" means on a device with this `flash_kernel`.

    can_cut: `divides_over`, and no segment continues another. XLA cannot partition a Pallas kernel over devices by
    itself.
    """
    is_half = dtype in (jnp.bfloat16, jnp.float16)
    if kernel == "cudnn" and is_half and softcap is None and head_dim % 8 == 0 and head_dim <= CUDNN_HEAD_DIM:
        return "cudnn"
    return "splash" if kernel == "splash" and can_cut else "xla"


def divides_over(sharding: NamedSharding | None, rows: int, kv_heads: int) -> bool:
    """Whether each device of the mesh can attend for whole rows and heads of its own."""
    if sharding is None:
        return jax.device_count() == 1
    has_whole_columns = num_shards(sharding, 1) == 1
    return has_whole_columns and rows % num_shards(sharding, 0) == 0 and kv_heads % sharding.mesh.shape["tensor"] == 0


def dot_product_attention(
    query: Float[Array, "B T H K"],
    keys_values: list[tuple[Array, Array]],
    visible: list[Array],
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T H K"]:
    """Plain matmuls, with one softmax over the keys of all parts.

    Parts are joined by the largest score and the sum of the exponentials of each (as in flash attention), never as an
    array of all scores: on CPU a decode step of 64 rows took 0.7 to 0.85 of the time that it took with one.
    """
    B, T, H, K = query.shape
    kv_heads = keys_values[0][0].shape[1]
    grouped = query.reshape(B, T, kv_heads, H // kv_heads, K)
    scores = []
    for (key, _), part in zip(keys_values, visible, strict=True):
        scores.append(_scores(grouped, key, part, scale, softcap))
    tops = [_by_token(part.max(axis=-1, keepdims=True), grouped.shape) for part in scores]
    top = jax.lax.stop_gradient(reduce(jnp.maximum, tops))
    totals = []
    outputs = []
    for part, (_, value) in zip(scores, keys_values, strict=True):
        masses = jnp.exp(part - _by_key(top, len(value)))
        weighted = jnp.matmul(masses.astype(query.dtype), value, preferred_element_type=jnp.float32)
        totals.append(_by_token(masses.sum(axis=-1, keepdims=True), grouped.shape))
        outputs.append(_by_token(weighted, grouped.shape))
    return (sum(outputs) / sum(totals)).astype(query.dtype).reshape(query.shape)


def _scores(query: Float[Array, "B T KV G K"], key: Float[Array, "R KV K S"], visible, scale: float, softcap):
    """Scores of every query and key, float32 [R KV T·B/R·G S]; MASK_VALUE where the key is not visible."""
    group = query.shape[3]
    scores = jnp.matmul(_by_key(query, len(key)), key, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jnp.where(jnp.repeat(visible, group, axis=1)[:, None], scores, MASK_VALUE)


def _by_key(x: Float[Array, "B T KV G C"], rows: int) -> Float[Array, "R KV Q C"]:
    """What belongs to queries, beside the row of keys that they attend to: Q = T·B/R·G queries for each key head."""
    _, _, kv_heads, group, C = x.shape
    return x.reshape(rows, -1, kv_heads, group, C).swapaxes(1, 2).reshape(rows, kv_heads, -1, C)


def _by_token(x: Float[Array, "R KV Q C"], shape: tuple[int, ...]) -> Float[Array, "B T KV G C"]:
    """The inverse of `_by_key`, for queries of this shape."""
    B, T, kv_heads, group, _ = shape
    by_head = x.reshape(len(x), kv_heads, -1, group, x.shape[-1])
    return by_head.swapaxes(1, 2).reshape(B, T, kv_heads, group, x.shape[-1])


def blockwise_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B KV K S"],
    value: Float[Array, "B KV S K"],
    visible: Bool[Array, "B T S"],
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T H K"]:
    """Attention whose bits are the same for a query alone or among others, and for any number of empty columns.

    Queries (of all heads that share keys) in tiles of LANE, one after the other; keys in blocks of BLOCK, and values
    padded to whole BLOCKs of width. So all products have the same two shapes, whatever T and S are. Blocks are added
    one after the other; masked columns and empty blocks add zeros. The maximum loses its last bit for the reason given
    in `ops.logprobs.softmax`. The derivative is that of `dot_product_attention`.
    """
    return _blockwise(query, key, value, visible, scale, softcap)


@partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _blockwise(query, key, value, visible, scale: float, softcap: float | None):
    B, T, H, K = query.shape
    kv_heads = key.shape[1]
    group = H // kv_heads
    key = pad_axis(key, 3, BLOCK)
    value = pad_axis(pad_axis(value, 2, BLOCK), 3, BLOCK)
    visible = jnp.repeat(pad_axis(visible, 2, BLOCK), group, axis=1)  # [B T·G S]
    grouped = query.reshape(B, T, kv_heads, group, K).swapaxes(1, 2).reshape(B, kv_heads, T * group, K)
    blocks = [slice(start, start + BLOCK) for start in range(0, key.shape[3], BLOCK)]

    def attend_tile(tile):
        """[B KV LANE K] -> [B KV LANE K]"""
        queries, seen = tile
        scores = []
        for block in blocks:
            score = jnp.matmul(queries, key[..., block], preferred_element_type=jnp.float32) * scale
            if softcap is not None:
                score = softcap * jnp.tanh(score / softcap)
            scores.append(jnp.where(seen[:, None, :, block], score, MASK_VALUE))
        top = reduce(jnp.maximum, [score.max(axis=-1, keepdims=True) for score in scores])
        top = jax.lax.reduce_precision(top, exponent_bits=8, mantissa_bits=22)
        masses = [jnp.exp(score - top) for score in scores]
        total = reduce(jnp.add, [tree_sum(mass) for mass in masses])
        weighted = []
        for mass, block in zip(masses, blocks, strict=True):
            weighted.append(jnp.matmul(mass.astype(query.dtype), value[:, :, block])[..., :K])
        return reduce(jnp.add, weighted) / total[..., None].astype(query.dtype)

    tiles = jax.lax.map(attend_tile, (split_tiles(grouped, 2, LANE), split_tiles(visible, 1, LANE)))
    out = join_tiles(tiles, 2, T * group)
    return out.reshape(B, kv_heads, T, group, K).swapaxes(1, 2).reshape(B, T, H, K)


@_blockwise.defjvp
def _blockwise_jvp(scale: float, softcap: float | None, primals, tangents):
    query, key, value, visible = primals

    def plain(query, key, value):
        return dot_product_attention(query, [(key, value)], [visible], scale, softcap)

    _, tangent = jax.jvp(plain, (query, key, value), tangents[:3])
    return _blockwise(query, key, value, visible, scale, softcap), tangent


def cudnn_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S KV K"],
    value: Float[Array, "B S KV K"],
    visible: Bool[Array, "B T S"],
    scale: float,
) -> Float[Array, "B T H K"]:
    """NVIDIA's flash attention. It takes a mask only for even lengths: others are padded by one column."""
    T = query.shape[1]
    mask = pad_axis(pad_axis(visible, 1, 2), 2, 2)[:, None]
    padded = [pad_axis(x, 1, 2) for x in (query, key, value)]
    return jax.nn.dot_product_attention(*padded, mask=mask, scale=scale, implementation="cudnn")[:, :T]


def splash_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S KV K"],
    value: Float[Array, "B S KV K"],
    attention_mask: AttentionMask,
    scale: float,
    window: int | None,
    softcap: float | None,
    sharding: NamedSharding | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H K"]:
    """JAX's splash attention. The queries' columns are the last of the keys'. Padding attends to padding.

    The kernel takes multiples of 128 columns: others are padded here, on the left, where no real query looks.

    Args:
      sharding: of hidden states on a mesh over which rows and heads divide.
      interpret: run without a TPU, slowly.
    """
    if attention_mask.context is not None:
        raise ValueError("splash attention knows no segment that continues another; legal: 'auto' or 'xla'")
    segments = attention_mask.segments if attention_mask.keys is None else attention_mask.keys[0][1]
    call = partial(_splash, scale=scale, window=window, softcap=softcap, interpret=interpret)
    if query.dtype != jnp.float32:
        call = _at_default_precision(call)
    if sharding is not None:
        rows = jax.P(sharding.spec[0])
        heads = jax.P(sharding.spec[0], None, "tensor")
        specs = (heads, heads, heads, rows)
        call = jax.shard_map(call, mesh=sharding.mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return call(query, key, value, segments)


def _splash(query, key, value, segments, scale: float, window, softcap, interpret: bool):
    """`splash_attention` on one device. segments: of the keys [B S], the last of which are the queries'."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    columns, head_dim = query.shape[1], query.shape[3]
    query, key, value = (_pad_left(_pad_left(x, 1), 3) for x in (query, key, value))
    segments = _pad_left(segments, 1)
    B, T, H, K = query.shape
    S, kv_heads = key.shape[1:3]
    if window is None:
        mask = masks.CausalMask((T, S), offset=S - T)
    else:
        mask = masks.LocalMask((T, S), (window - 1, 0), offset=S - T)
    kernel = kernels.make_splash_mqa_single_device(
        masks.MultiHeadMask([mask] * (H // kv_heads)), attn_logits_soft_cap=softcap, interpret=interpret
    )

    queries = jnp.moveaxis((query * scale).astype(query.dtype), 1, 2).reshape(B, kv_heads, H // kv_heads, T, K)
    over_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    over_rows = jax.vmap(over_heads)
    segment_ids = kernels.SegmentIds(segments[:, S - T :], segments)  # an added query attends to its column, at least
    out = over_rows(queries, jnp.moveaxis(key, 1, 2), jnp.moveaxis(value, 1, 2), segment_ids)
    return jnp.moveaxis(out.reshape(B, H, T, K)[:, :, -columns:, -head_dim:], 1, 2).astype(query.dtype)


def _at_default_precision(attention: Callable) -> Callable:
    """attention(query, key, value, segments), whose kernels multiply as if `jax_default_matmul_precision` were not set.

    Of products of bfloat16 in float32 the TPU's compiler of kernels knows nothing. They are exact as they are.
    """

    def forward(query, key, value, segments):
        with jax.default_matmul_precision("default"):
            return jax.vjp(lambda *inputs: attention(*inputs, segments), query, key, value)

    def backward(pull_back, slopes):
        with jax.default_matmul_precision("default"):
            return *pull_back(slopes), None

    @jax.custom_vjp
    def call(query, key, value, segments):
        with jax.default_matmul_precision("default"):
            return attention(query, key, value, segments)

    call.defvjp(forward, backward)
    return call


def _pad_left(x: Array, axis: int) -> Array:
    """x with zeros before it along the axis, up to a multiple of TPU_LANES."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (-x.shape[axis] % TPU_LANES, 0)
    return jnp.pad(x, widths)
