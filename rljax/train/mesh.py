"""Sharding as data: one table from logical axis names to mesh axes, and the shardings that follow from it.

Mesh axes, each of size 1 where it is not used:

    data      copies of the parameters, each with its share of the rows
    fsdp      parameters sharded, and rows
    sequence  the columns of a row sharded in scoring and update (context parallelism); in a sampler rows
    expert    experts of mixture layers sharded, and rows
    tensor    heads, MLP and vocabulary sharded

A dimension that its mesh axes do not divide is sharded over the first of them that do, or over none.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from rljax.types import Params, PromptBatch, TrainState

AXES = ("data", "fsdp", "sequence", "expert", "tensor")
RULES = {
    # of parameters
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocabulary": ("tensor", "fsdp"),
    "experts": ("expert",),
    # of what is computed
    "rows": ("data", "fsdp", "expert"),  # of scoring and update
    "columns": ("sequence",),
    "rollout_rows": ("data", "fsdp", "expert", "sequence"),  # a sampler has no long sequence to split
}

HOST_MEMORY = "pinned_host"
OFFLOADABLE = ("opt_state", "frozen")


class Shardings(NamedTuple):
    """A TrainState of shardings, the sharding of rows, and the replicated one."""

    state: TrainState
    rows: NamedSharding
    replicated: NamedSharding


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    *,
    sequence: int = 1,
    expert: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over all devices; one size may be -1: the rest. Raises ValueError unless the product is their number.

    Of several TPU slices each holds a part of the axis `data`, a multiple of their number, and the whole of the others.
    devices: default those of all processes; or those of a topology that a program is compiled for.
    """
    devices = jax.devices() if devices is None else devices
    asked = {"data": data, "fsdp": fsdp, "sequence": sequence, "expert": expert, "tensor": tensor}
    sizes = list(asked.values())
    count = len(devices)
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known > 0 and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if min(sizes) < 1 or math.prod(sizes) != count:
        legal = [d for d in range(1, count + 1) if count % d == 0]
        raise ValueError(
            f"mesh {' x '.join(asked)} = {' x '.join(map(str, asked.values()))} does not cover {count} devices; "
            f"each size must be one of {legal}, their product {count} (one may be -1: the rest)"
        )
    return Mesh(_arrange(devices, *sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arrange(devices: Sequence[jax.Device], data: int, *others: int) -> np.ndarray:
    """The devices in the order of the mesh: neighbors of an axis are near each other."""
    is_tpu = devices[0].platform == "tpu"  # GPUs have slices too, their hosts, which any axis may span
    # The devices of a topology that is only compiled for are of one slice, and do not say its number.
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if is_tpu else 1
    if data % slices:
        raise ValueError(
            f"mesh data = {data} on {slices} TPU slices, between which only data goes; legal: a multiple of {slices}"
        )
    shape, across = (data // slices, *others), (slices,) + (1,) * len(others)
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(shape, across, devices, allow_split_physical_axes=True)


def sharding_of(mesh: Mesh, axes: tuple, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of one array with these logical axes. An axis that its mesh axes do not divide is not sharded."""

    def mesh_axes(name: str | None, size: int) -> tuple[str, ...] | None:
        names = RULES.get(name, ())
        while names and size % math.prod(mesh.shape[n] for n in names):
            names = names[:-1]
        return names or None

    spec = [mesh_axes(name, size) for name, size in zip(axes, shape, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*spec))


def hidden_sharding(mesh: Mesh) -> NamedSharding | None:
    """The sharding of hidden states [B T D] in scoring and update; None on one device."""
    return None if mesh.size == 1 else NamedSharding(mesh, PartitionSpec(RULES["rows"], RULES["columns"], None))


def param_shardings(mesh: Mesh, axes: Params, shapes: Params) -> Params:
    """A sharding for each parameter, from its logical axes (tuples) and its shape."""
    return jax.tree.map(lambda leaf, names: sharding_of(mesh, names, leaf.shape), shapes, axes)


def state_shardings(
    mesh: Mesh,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    axes: Params,
    frozen_axes: dict[str, Params] | None = None,
    offload: tuple[str, ...] = (),
) -> Shardings:
    """Shardings of a state: optimizer statistics and the reference as the parameters, all else replicated.

    Args:
      state: the state, or its shapes.
      axes: a tuple of logical axes for each parameter; frozen_axes: the same for parts of `frozen` (a base).
      offload: what is kept in the host's memory between its uses, of OFFLOADABLE. Raises ValueError where devices have
        no such memory.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    params = param_shardings(mesh, axes, state.params)
    all_replicated = jax.tree.map(lambda _: replicated, state)
    frozen = dict(all_replicated.frozen)
    if "reference" in frozen:
        frozen["reference"] = {name: params[name] for name in frozen["reference"]}
    for name, part_axes in (frozen_axes or {}).items():
        frozen[name] = param_shardings(mesh, part_axes, state.frozen[name])

    def like_parameter(leaf, sharding, param):
        if isinstance(leaf, optax.MaskedNode):  # parameters that this part of the optimizer does not update
            return leaf
        return sharding if leaf.shape == param.shape else replicated  # Adafactor: a row and a column of a matrix

    opt_state = optax.tree_map_params(
        optimizer,
        like_parameter,
        state.opt_state,
        params,
        state.params,
        transform_non_params=lambda _: replicated,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    shardings = all_replicated.replace(params=params, opt_state=opt_state, frozen=frozen)
    for name in offload:
        on_host = _on_host(mesh, name, getattr(state, name), getattr(shardings, name))
        shardings = shardings.replace(**{name: on_host})
    return Shardings(shardings, NamedSharding(mesh, PartitionSpec(RULES["rows"])), replicated)


def _on_host(mesh: Mesh, name: str, tree: Any, shardings: Any) -> Any:
    """The shardings with arrays in pinned host memory; scalars stay on the devices."""
    absent = isinstance(mesh, AbstractMesh)  # a mesh for plans, without devices to ask
    kinds = {HOST_MEMORY} if absent else {memory.kind for memory in mesh.devices.flat[0].addressable_memories()}
    if name not in OFFLOADABLE or HOST_MEMORY not in kinds:
        raise ValueError(
            f"offload {name!r}: legal: {OFFLOADABLE}, on devices with {HOST_MEMORY} memory; here: {sorted(kinds)}"
        )

    def to_host(leaf, sharding):
        return sharding.with_memory_kind(HOST_MEMORY) if leaf.ndim else sharding

    return jax.tree.map(to_host, tree, shardings)


def data_parallel_size(mesh: Mesh, rule: str = "rows") -> int:
    """The number of devices that the rows of an update, or the "rollout_rows" of a sampler, are sharded over."""
    return math.prod(mesh.shape[name] for name in RULES[rule])


def place(tree: Any, shardings: Any, donate: bool = False) -> Any:
    """The tree on the devices, in these shardings (one for all leaves, or one for each).

    Where they span processes, every process holds the same values, and gives its devices their part.

    Args:
      donate: an array that moves to another kind of memory is deleted where it was, even where other names refer to it.
    """
    if isinstance(shardings, NamedSharding):
        placed = jax.tree.map(lambda x: _place_array(x, shardings), tree)
    else:
        placed = jax.tree.map(_place_array, tree, shardings)
    if donate:
        jax.tree.map(_delete_moved, tree, placed)
    return placed


def _delete_moved(x: Any, placed: jax.Array) -> None:
    if isinstance(x, jax.Array) and x.sharding.memory_kind != placed.sharding.memory_kind:
        x.delete()


def _place_array(x: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_place_array(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
    x = np.asarray(x, jnp.result_type(x))
    return jax.make_array_from_process_local_data(sharding, x, x.shape)


def shard_rows(shardings: Shardings, tree: Any) -> Any:
    """The tree on the devices: arrays sharded by rows, scalars replicated. ValueError where rows do not divide."""
    devices = data_parallel_size(shardings.rows.mesh)

    def to_devices(x):
        if np.ndim(x) == 0:
            return place(x, shardings.replicated)
        if x.shape[0] % devices:
            raise ValueError(
                f"{x.shape[0]} rows do not divide over {devices} devices ({' x '.join(RULES['rows'])}); "
                f"take a multiple of {devices}"
            )
        return place(x, shardings.rows)

    return jax.tree.map(to_devices, tree)


def row_shapes(shardings: Shardings, tree: Any) -> Any:
    """The shapes of what `shard_rows` returns, for a tree of shapes."""

    def placed(x):
        sharding = shardings.rows if x.ndim else shardings.replicated
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=x.weak_type)

    return jax.tree.map(placed, tree)


def shard_prompts(shardings: Shardings, rows: PromptBatch) -> PromptBatch:
    """The prompts with their arrays on the devices as a sampler's rows are. Any number of them: those that do not
    divide over the devices are copied to all of them, or to some."""
    mesh = shardings.rows.mesh

    def to_devices(x):
        axes = ("rollout_rows", *[None] * (x.ndim - 1))
        return place(x, sharding_of(mesh, axes, x.shape))

    tokens, mask, number = map(to_devices, (rows.tokens, rows.mask, rows.number))
    return rows._replace(tokens=tokens, mask=mask, number=number)
