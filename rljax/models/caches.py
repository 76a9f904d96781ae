"""The KV cache of a decoder: a plain pytree of keys and values, and of the position and segment of each column.

    layers               one {"key" [B KV K S], "value" [B KV S K]} for each layer; or {"key" [B n KV K S], "value"
                         [B n KV S K]} for each stack of n scanned layers
    positions, segments  [B S]; segment 0: an empty column
    length               [B] columns in use: the next token of a row goes into column length[b]
    routing              [B S M k] experts chosen for each token (mixtures of experts)
    shared               after `fork`: the cache of a common prefix. It has P rows, and each serves n = B/P neighboring
                         rows, which attend to it before their own columns
    end                  [] after `fork`, of the rows and of `shared`: columns in use, which are as many in every row

A row's tokens may come in any number of calls: a prompt, one token at a time, the reply of a tool.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Int, Shaped

from rljax.models.attention import AttentionMask
from rljax.models.partition import num_shards

Cache = dict[str, Any]
PER_TOKEN = ("layers", "positions", "segments", "routing")  # entries that have a column for each token
COLUMN_AXIS = {"key": -1, "value": -2}  # axis of the columns, where it is not 1


def init(
    stacked: Sequence[tuple[int, ...]],
    rows: int,
    length: int,
    num_kv_heads: int,
    head_dim: int,
    dtype,
    routing: tuple[int, int, Any] | None = None,
) -> Cache:
    """An empty cache for `rows` rows of up to `length` tokens.

    Args:
      stacked: for each layer (), or for each stack of layers (n,).
      routing: (number of mixture-of-experts layers, experts per token, dtype of their indices); None: no such layers.
    """
    key = (num_kv_heads, head_dim, length)
    value = (num_kv_heads, length, head_dim)
    cache = {
        "layers": [
            {"key": jnp.zeros((rows, *n, *key), dtype), "value": jnp.zeros((rows, *n, *value), dtype)} for n in stacked
        ],
        "positions": jnp.zeros((rows, length), jnp.int32),
        "segments": jnp.zeros((rows, length), jnp.int32),
        "length": jnp.zeros(rows, jnp.int32),
    }
    if routing is not None:
        layers, experts, routing_dtype = routing
        cache["routing"] = jnp.zeros((rows, length, layers, experts), routing_dtype)
    return cache


# ------------------------------------------------------------------------------------- appending tokens, attending


def write_columns(
    buffer: Shaped[Array, "B ..."], new: Shaped[Array, "B ..."], start: Int[Array, "B"], axis: int = 1
) -> Shaped[Array, "B ..."]:
    """`buffer` with the columns `new` written from column start[b] of each row on; `axis` is that of the columns."""

    def write_row(row, new_row, first):
        return jax.lax.dynamic_update_slice_in_dim(row, new_row.astype(row.dtype), first, axis=axis - 1)

    return jax.vmap(write_row)(buffer, new, start)


def append_positions(cache: Cache, positions: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Cache:
    """The cache with the positions and segments of T new columns; their keys and values follow layer by layer."""
    start = cache["length"]
    T = positions.shape[1]
    end = {"end": cache["end"] + T} if "end" in cache else {}
    return {
        **cache,
        **end,
        "positions": write_columns(cache["positions"], positions, start),
        "segments": write_columns(cache["segments"], segments, start),
        "length": start + T,
    }


def is_filled_by(cache: Cache, columns: int) -> bool:
    """Whether so many new columns fill the whole cache: it is empty then, and they attend to themselves alone."""
    return "shared" not in cache and columns == cache["segments"].shape[1]


class Place(NamedTuple):
    """Where new columns stand in a cache."""

    start: Int[Array, "B"]  # the first of them
    ends: tuple[Int[Array, ""], ...] | None  # columns in use of a shared prefix and of all rows; None: rows may differ


class LayerCache(NamedTuple):
    """What one layer reads and writes."""

    shared: dict[str, Array] | None  # keys and values of the shared prefix
    own: dict[str, Array]  # of the rows' own columns
    place: Int[Array, ""] | None = None  # of the layer, where these are those of a stack

    def append(self, key: Array, value: Array, start: Int[Array, "B"]) -> "LayerCache":
        """With keys and values [B T KV K] of new columns. Of a stack nothing else is written."""
        new = {"key": jnp.moveaxis(key, 1, 3), "value": jnp.moveaxis(value, 1, 2)}
        return self._replace(own={name: self._write(name, new[name], start) for name in new})

    def _write(self, name: str, new: Array, start: Int[Array, "B"]) -> Array:
        if self.place is None:
            return write_columns(self.own[name], new, start, COLUMN_AXIS[name] % 4)

        def write_row(row, new_row, first):  # [n KV K S], [KV K T]
            begin = [self.place, 0, 0, 0]
            begin[COLUMN_AXIS[name]] = first
            return jax.lax.dynamic_update_slice(row, new_row[None].astype(row.dtype), begin)

        return jax.vmap(write_row)(self.own[name], new, start)

    def keys_values(self) -> list[tuple[Array, Array]]:
        """(keys [R KV K S], values [R KV S K]) of the shared prefix, if there is one, and of the rows."""
        parts = [part for part in (self.shared, self.own) if part is not None]
        if self.place is not None:
            parts = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, self.place, axis=1, keepdims=False), parts)
        return [(part["key"], part["value"]) for part in parts]


def cache_mask(cache: Cache, positions: Int[Array, "B T"], segments: Int[Array, "B T"]) -> AttentionMask:
    """The attention mask of queries at these positions: keys are those of the shared prefix and of the cache."""
    keys = tuple((part["positions"], part["segments"]) for part in _parts(cache))
    return AttentionMask(positions, segments, keys)


def _parts(cache: Cache) -> list[Cache]:
    return [cache["shared"], cache] if "shared" in cache else [cache]


def ends(cache: Cache) -> tuple[Int[Array, ""], ...] | None:
    """Columns in use of the shared prefix and of the rows; None where rows may differ."""
    return tuple(part["end"] for part in _parts(cache)) if "end" in cache else None


def within_window(
    keys_values: list[tuple[Array, Array]], mask: AttentionMask, ends: tuple[Int[Array, ""], ...], window: int
) -> tuple[list[tuple[Array, Array]], AttentionMask]:
    """Keys, values and mask of the columns that T new ones can reach in a layer with a window.

    Those are the last window + T - 1 of the rows, new ones included, and the last window - 1 of a prefix before them.
    What is in use is taken to be without gaps: padding is at the left end of a prefix, and after the end of a row.
    """
    T = mask.positions.shape[1]
    reach = [window - 1] * (len(ends) - 1) + [window + T - 1]

    def cut(part: int, x: Array, axis: int) -> Array:
        size = min(x.shape[axis], max(1, reach[part]))
        return jax.lax.dynamic_slice_in_dim(x, jnp.maximum(ends[part] - size, 0), size, axis)

    near = [(cut(i, key, 3), cut(i, value, 2)) for i, (key, value) in enumerate(keys_values)]
    keys = tuple((cut(i, positions, 1), cut(i, segments, 1)) for i, (positions, segments) in enumerate(mask.keys))
    return near, mask._replace(keys=keys)


def layer_caches(cache: Cache) -> list[LayerCache]:
    """What each layer reads and writes; of stacks, still of all their layers."""
    shared = cache["shared"]["layers"] if "shared" in cache else [None] * len(cache["layers"])
    return list(map(LayerCache, shared, cache["layers"]))


# ------------------------------------------------------------------------------------------------- operations on rows


def gather(cache: Cache, rows: Int[Array, "R"], sharding: NamedSharding | None = None) -> Cache:
    """The cache of rows[0], rows[1], ...: a prompt's for a slot, or the unfinished rows for a smaller batch.

    On a mesh no device ever has more than its share. For as many rows as devices or more, the shares go round, and each
    device keeps what it needs of each; a few rows come from their owners to all devices.

    Args:
      sharding: of the hidden states in the sampler, whose rows are sharded as the cache's are.
    """
    devices = num_shards(sharding, 0)
    if devices == 1:
        return jax.tree.map(lambda x: x[rows], cache)
    R = len(rows)
    goes_round = devices <= R
    cache = jax.tree.map(lambda x: _pad_rows(x, devices), cache)
    rows = _pad_rows(rows, devices) if goes_round else rows
    axes = sharding.spec[0]
    take = jax.shard_map(
        partial(_take_round, axes=axes, devices=devices) if goes_round else partial(_take_few, axes=axes),
        mesh=sharding.mesh,
        axis_names=set(axes),
        in_specs=(jax.P(axes), jax.P(axes) if goes_round else jax.P()),
        out_specs=jax.P(axes) if goes_round else jax.P(),
        check_vma=False,
    )
    return jax.tree.map(lambda x: x[:R], take(cache, rows))


def _pad_rows(x: Array, multiple: int) -> Array:
    return jnp.pad(x, [(0, -len(x) % multiple)] + [(0, 0)] * (x.ndim - 1))


def _take_round(shard: Cache, rows: Int[Array, "R/d"], axes: tuple[str, ...], devices: int) -> Cache:
    """On one of the devices: its rows, out of the shards of all, which are passed on from device to device."""
    size = len(shard["length"])
    me = jax.lax.axis_index(axes)
    to_previous = [((i + 1) % devices, i) for i in range(devices)]

    def take_from(turn, state):
        shard, taken = state
        place = rows - (me + turn) % devices * size  # of the rows in the shard that is here now
        is_here = (place >= 0) & (place < size)

        def take(old, x):
            found = x[jnp.clip(place, 0, size - 1)]
            return jnp.where(is_here.reshape(-1, *[1] * (x.ndim - 1)), found, old)

        taken = jax.tree.map(take, taken, shard)
        return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, to_previous), shard), taken

    nothing = jax.tree.map(lambda x: jnp.zeros((len(rows), *x.shape[1:]), x.dtype), shard)
    return jax.lax.fori_loop(0, devices, take_from, (shard, nothing))[1]


def _take_few(shard: Cache, rows: Int[Array, "R"], axes: tuple[str, ...]) -> Cache:
    """On each of the devices the same rows: the sum over devices of what each has of them."""
    size = len(shard["length"])
    place = rows - jax.lax.axis_index(axes) * size
    is_here = (place >= 0) & (place < size)

    def take(x):
        found = x[jnp.clip(place, 0, size - 1)]
        return jax.lax.psum(jnp.where(is_here.reshape(-1, *[1] * (x.ndim - 1)), found, 0), axes)

    return jax.tree.map(take, shard)


def scatter(cache: Cache, rows: Int[Array, "R"], other: Cache) -> Cache:
    """The cache with rows[i] replaced by row i of `other`, which may have fewer columns: refills finished slots."""

    def replace_rows(path, x, y):
        axis = _column_axis(path, x)
        before = (slice(None),) * (axis - 1)
        columns = slice(y.shape[axis])
        return x.at[(rows, *before, columns)].set(y)

    filled = jax.tree.map_with_path(replace_rows, _per_token(cache), _per_token(other))
    empty = cache["segments"].shape[1] - other["segments"].shape[1]
    segments = jnp.pad(other["segments"], ((0, 0), (0, empty)))
    filled["segments"] = cache["segments"].at[rows].set(segments)
    return cache | filled | {"length": cache["length"].at[rows].set(other["length"])}


def grow(cache: Cache, columns: int) -> Cache:
    """The cache with that many more columns, empty."""

    def pad_columns(path, x):
        return jnp.pad(x, [(0, columns if axis == _column_axis(path, x) else 0) for axis in range(x.ndim)])

    return cache | jax.tree.map_with_path(pad_columns, _per_token(cache))


def crop(cache: Cache, length: Int[Array, "B"]) -> Cache:
    """The cache with only the first length[b] columns of each row in use; the others are empty, to be written again."""
    column = jnp.arange(cache["segments"].shape[1])[None]
    segments = jnp.where(column < length[:, None], cache["segments"], 0)
    return cache | {"segments": segments, "length": length}


def fork(cache: Cache, n: int, columns: int) -> Cache:
    """n rows for each row of the cache, which they share as a prefix, with that many empty columns of their own.

    All prefixes end in the same column (they are padded on the left), and all rows go on together.
    """
    rows = cache["length"].shape[0] * n

    def empty(path, x):
        sizes = {0: rows, _column_axis(path, x): columns}
        return jnp.zeros([sizes.get(axis, size) for axis, size in enumerate(x.shape)], x.dtype)

    shared = _per_token(cache)
    own = jax.tree.map_with_path(empty, shared)
    end = cache["length"].max(initial=0)
    return own | {"length": jnp.zeros(rows, jnp.int32), "end": jnp.int32(0), "shared": shared | {"end": end}}


def repeat_kv(cache: Cache, n: int, columns: int) -> Cache:
    """The same rows as `fork` makes, without sharing: each of the n rows has a copy of the prefix."""
    return grow(jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), cache), columns)


def routing(cache: Cache) -> Int[Array, "B S M k"]:
    """The experts chosen for each token."""
    if "shared" not in cache:
        return cache["routing"]
    shared = cache["shared"]["routing"]
    n = len(cache["routing"]) // len(shared)
    return jnp.concatenate([jnp.repeat(shared, n, axis=0), cache["routing"]], axis=1)


# ---------------------------------------------------------------------------------------------------------- on a mesh


def constrain(cache: Cache, sharding: NamedSharding | None) -> Cache:
    """The cache with its rows where the hidden states' are, and its heads over the mesh axis `tensor`.

    Keys and values of heads that do not divide are left to XLA, which cuts them over a part of that axis.
    """
    if sharding is None:
        return cache

    def constrain_leaf(path, x):
        if x.ndim == 0:
            return x
        spec = [sharding.spec[0], *[None] * (x.ndim - 1)]
        if getattr(path[-1], "key", None) in COLUMN_AXIS:
            if x.shape[-3] % sharding.mesh.shape["tensor"]:
                return x
            spec[-3] = "tensor"
        return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, jax.P(*spec)))

    return jax.tree.map_with_path(constrain_leaf, cache)


def _column_axis(path, x: Array) -> int:
    return COLUMN_AXIS.get(getattr(path[-1], "key", None), 1) % x.ndim


def _per_token(cache: Cache) -> Cache:
    return {name: cache[name] for name in PER_TOKEN if name in cache}
