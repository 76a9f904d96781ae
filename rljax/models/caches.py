"""The cache of a decoder: a plain pytree of keys and values, and of what stands in which column.

    layers               one {"key" [B KV K S], "value" [B KV S K]} a layer
    positions, segments  [B S]; segment 0: nothing there
    length               [B] columns in use: where a row's next token goes
    routing              [B S M k] experts that each token took (mixture models)
    shared               after `fork`: such a cache of P rows that B = P·n rows look at first, n neighbours at each

A row's tokens may come in any number of calls: a prompt, one token at a time, the reply of a tool.
"""

import jax
import jax.numpy as jnp

from rljax.models.attention import Sight

Cache = dict
COLUMNS = ("layers", "positions", "segments", "routing")  # what has a column for each token
AXIS = {"key": 3, "value": 2}  # of the columns, where it is not 1


def init(layers: int, rows: int, length: int, kv_heads: int, head_dim: int, dtype, routing=None) -> Cache:
    """An empty cache for `rows` rows of up to `length` tokens. routing: (mixture layers, experts taken, dtype)."""
    shapes = {"key": (rows, kv_heads, head_dim, length), "value": (rows, kv_heads, length, head_dim)}
    cache = {
        "layers": [{name: jnp.zeros(shape, dtype) for name, shape in shapes.items()} for _ in range(layers)],
        "positions": jnp.zeros((rows, length), jnp.int32),
        "segments": jnp.zeros((rows, length), jnp.int32),
        "length": jnp.zeros(rows, jnp.int32),
    }
    if routing is not None:
        *shape, dtype = routing
        cache["routing"] = jnp.zeros((rows, length, *shape), dtype)
    return cache


def write(buffer, new, where, axis: int = 1):
    """Put new [B T ...] into buffer [B S ...] at column where[b] of each row; `axis`: where both have their columns."""
    put = jax.lax.dynamic_update_slice_in_dim
    return jax.vmap(lambda b, n, w: put(b, n.astype(b.dtype), w, axis=axis - 1))(buffer, new, where)


def append(layer: dict, key, value, where) -> dict:
    """The layer with keys and values [B T KV K] of new columns."""
    new = {"key": jnp.moveaxis(key, 1, 3), "value": jnp.moveaxis(value, 1, 2)}
    return {name: write(layer[name], new[name], where, AXIS[name]) for name in layer}


def _axis(path) -> int:
    return AXIS.get(getattr(path[-1], "key", None), 1)


def _columns(cache: Cache) -> Cache:
    return {name: cache[name] for name in COLUMNS if name in cache}


def see(positions, segments, cache: Cache | None):
    """The cache, if there is one, with the places of the new columns; who sees whom; where the new columns go."""
    if cache is None:
        return None, Sight(positions, segments), None
    where = cache["length"]
    places = {name: write(cache[name], new, where) for name, new in (("positions", positions), ("segments", segments))}
    cache = {**cache, **places, "length": where + positions.shape[1]}
    parts = [cache["shared"], cache] if "shared" in cache else [cache]
    return cache, Sight(positions, segments, tuple((part["positions"], part["segments"]) for part in parts)), where


def by_layer(cache: Cache) -> list[tuple]:
    """Of each layer: the shared part or None, and the own."""
    shared = cache["shared"]["layers"] if "shared" in cache else [None] * len(cache["layers"])
    return list(zip(shared, cache["layers"], strict=True))


def gather(cache: Cache, rows) -> Cache:
    """The cache of rows[0], rows[1], ...: a prompt's for a slot, those still at work for a smaller batch."""
    return jax.tree.map(lambda x: x[rows], cache)


def scatter(cache: Cache, rows, other: Cache) -> Cache:
    """The cache with rows[i] replaced by row i of `other`, which may be shorter: refills finished slots."""

    def put(path, x, y):
        axis = _axis(path)
        return x.at[(rows, *(slice(None),) * (axis - 1), slice(y.shape[axis]))].set(y)

    filled = jax.tree.map_with_path(put, _columns(cache), _columns(other))
    blank = ((0, 0), (0, cache["segments"].shape[1] - other["segments"].shape[1]))
    filled["segments"] = cache["segments"].at[rows].set(jnp.pad(other["segments"], blank))
    return cache | filled | {"length": cache["length"].at[rows].set(other["length"])}


def grow(cache: Cache, columns: int) -> Cache:
    """The cache with that many more columns, empty."""

    def more(path, x):
        return jnp.pad(x, [(0, columns if axis == _axis(path) else 0) for axis in range(x.ndim)])

    return cache | jax.tree.map_with_path(more, _columns(cache))


def fork(cache: Cache, n: int, columns: int) -> Cache:
    """n rows for each row of the cache, which they share, with that many empty columns of their own."""
    rows = cache["length"].shape[0] * n

    def empty(path, x):
        sizes = {0: rows, _axis(path): columns}
        return jnp.zeros([sizes.get(axis, size) for axis, size in enumerate(x.shape)], x.dtype)

    shared = _columns(cache)
    return jax.tree.map_with_path(empty, shared) | {"length": jnp.zeros(rows, jnp.int32), "shared": shared}


def copies(cache: Cache, n: int, columns: int) -> Cache:
    """`fork` with a copy for each: whole rows."""
    return grow(jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), cache), columns)


def routing(cache: Cache):
    """Experts chosen at each token. [B S M k]"""
    if "shared" not in cache:
        return cache["routing"]
    shared = cache["shared"]["routing"]
    return jnp.concatenate([jnp.repeat(shared, len(cache["routing"]) // len(shared), axis=0), cache["routing"]], axis=1)
