"""Sharding as data: logical axis name -> mesh axis, one table; every array is made in its place.

Mesh axes: `data` (replicas), `fsdp` (rows and parameters both cut), `tensor` (heads, MLP and vocabulary cut). One
device is a mesh of 1 x 1 x 1: the same code.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rljax.types import Params, Rows, TrainState

AXES = ("data", "fsdp", "tensor")
RULES = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocabulary": ("tensor", "fsdp"),
    "rows": ("data", "fsdp"),
}

HOST = "pinned_host"
OFFLOADED = ("opt_state", "frozen")


class Shardings(NamedTuple):
    """Where everything lives: a TrainState of shardings, the sharding of rows, and the replicated one."""

    state: TrainState
    rows: NamedSharding
    replicated: NamedSharding


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1) -> Mesh:
    """A mesh over all devices; one size may be -1: the rest. Raises ValueError unless the product is their number."""
    sizes, count = [data, fsdp, tensor], jax.device_count()
    known = int(np.prod([s for s in sizes if s != -1]))
    if sizes.count(-1) == 1 and known > 0 and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if min(sizes) < 1 or np.prod(sizes) != count:
        legal = [d for d in range(1, count + 1) if count % d == 0]
        raise ValueError(
            f"mesh data x fsdp x tensor = {data} x {fsdp} x {tensor} does not cover {count} devices; "
            f"each size must be one of {legal}, their product {count} (one may be -1: the rest)"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def sharding_of(mesh: Mesh, axes: tuple, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of one array with these logical axes. An axis that its mesh axes do not divide stays whole."""

    def place(name, size):
        wanted = RULES.get(name)
        names = () if wanted is None else (wanted,) if isinstance(wanted, str) else wanted
        while names and size % int(np.prod([mesh.shape[n] for n in names])):
            names = names[:-1]
        return names or None

    return NamedSharding(mesh, PartitionSpec(*(place(n, s) for n, s in zip(axes, shape, strict=True))))


def param_shardings(mesh: Mesh, axes: Params, shapes: Params) -> Params:
    """A sharding per parameter, from its logical axes (tuples) and its shape."""
    return jax.tree.map(lambda leaf, names: sharding_of(mesh, names, leaf.shape), shapes, axes)


def state_shardings(
    mesh: Mesh,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    axes: Params,
    frozen_axes: dict[str, Params] | None = None,
    offload: tuple[str, ...] = (),
) -> Shardings:
    """Shardings of a state: optimizer statistics and the reference lie as the parameters do, the rest is replicated.

    Args:
      state: the state, or its shapes.
      axes: a tuple of logical axes per parameter; frozen_axes: the same for parts of `frozen` (a base).
      offload: what waits in the host's memory between its uses, of OFFLOADED. Raises ValueError where devices have no
        such memory.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    params = param_shardings(mesh, axes, state.params)
    everywhere = jax.tree.map(lambda _: replicated, state)
    frozen = dict(everywhere.frozen)
    if "reference" in frozen:
        frozen["reference"] = {name: params[name] for name in frozen["reference"]}
    for name, of_part in (frozen_axes or {}).items():
        frozen[name] = param_shardings(mesh, of_part, state.frozen[name])

    def lie(leaf, place, param):
        if isinstance(leaf, optax.MaskedNode):  # a part of the parameters that this part of the optimizer leaves alone
            return leaf
        return place if leaf.shape == param.shape else replicated  # Adafactor: a row and a column of a matrix

    opt_state = optax.tree_map_params(
        optimizer,
        lie,
        state.opt_state,
        params,
        state.params,
        transform_non_params=lambda _: replicated,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    placed = everywhere.replace(params=params, opt_state=opt_state, frozen=frozen)
    for name in offload:
        placed = placed.replace(**{name: _on_host(mesh, name, getattr(state, name), getattr(placed, name))})
    return Shardings(placed, NamedSharding(mesh, PartitionSpec(RULES["rows"])), replicated)


def _on_host(mesh: Mesh, name: str, tree: Any, shardings: Any) -> Any:
    """The shardings with arrays in pinned host memory; scalars stay where they are."""
    kinds = {memory.kind for memory in mesh.devices.flat[0].addressable_memories()}
    if name not in OFFLOADED or HOST not in kinds:
        raise ValueError(f"offload {name!r}: legal: {OFFLOADED}, on devices with {HOST} memory; here: {sorted(kinds)}")
    return jax.tree.map(lambda x, place: place.with_memory_kind(HOST) if x.ndim else place, tree, shardings)


def data_parallel_size(mesh: Mesh) -> int:
    """Devices that rows are spread over (data x fsdp)."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def shard_rows(shardings: Shardings, tree: Any) -> Any:
    """Put arrays of rows in their place, scalars everywhere. Raises ValueError where rows do not divide."""
    ways = data_parallel_size(shardings.rows.mesh)

    def put(x):
        if np.ndim(x) and x.shape[0] % ways:
            raise ValueError(
                f"{x.shape[0]} rows do not divide over {ways} devices (data x fsdp); take a multiple of {ways}"
            )
        return jax.device_put(x, shardings.rows if np.ndim(x) else shardings.replicated)

    return jax.tree.map(put, tree)


def shard_prompts(shardings: Shardings, rows: Rows) -> Rows:
    """The prompts with their arrays spread over the devices as rows are."""
    tokens, mask, number = shard_rows(shardings, (rows.tokens, rows.mask, rows.number))
    return rows._replace(tokens=tokens, mask=mask, number=number)
