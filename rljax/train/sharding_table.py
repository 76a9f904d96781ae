"""Where every array of a training state lies, as the rows of a table."""

import math
from typing import Any

import jax
from jax.sharding import NamedSharding

from rljax.train.mesh import HOST_MEMORY, Shardings
from rljax.types import Params, TrainState

PARTS = ("params", "opt_state", "frozen")


def sharding_table(state: TrainState, shardings: Shardings, axes: Params) -> list[dict[str, Any]]:
    """A row for each array: its path, shape and dtype, its axes ("embed over fsdp"), and its bytes on one device.

    The last rows are the sums of parameters, optimizer state and frozen parameters, and of all of them.

    Args:
      state: the state, or its shapes.
      axes: logical axes of the parameters, trained and frozen: {"params": ..., "frozen": {name: ...}}. An optimizer's
        statistic has those of its parameter.
    """
    names = {_path(keys): leaf for keys, leaf in _leaves(axes, is_leaf=lambda x: isinstance(x, tuple))}
    rows = []
    sums = dict.fromkeys(PARTS, 0)
    for part in PARTS:
        places = jax.tree.leaves(getattr(shardings.state, part))
        for (keys, leaf), place in zip(_leaves(getattr(state, part)), places, strict=True):
            path = (part, *_path(keys))
            row = _row(path, leaf, place, _axes_of(path, names, leaf.ndim))
            rows.append(row)
            sums[part] += row["bytes a device"]
    sums["all"] = sum(sums.values())
    empty = {"shape": "", "dtype": "", "axes": ""}
    return rows + [{"array": f"sum of {part}", **empty, "bytes a device": size} for part, size in sums.items()]


def _leaves(tree: Any, is_leaf=None) -> list[tuple]:
    return jax.tree.leaves_with_path(tree, is_leaf=is_leaf)


def _path(keys: tuple) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def _axes_of(path: tuple[str, ...], names: dict[tuple, tuple], ndim: int) -> tuple:
    """The logical axes of the array itself, or of the parameter whose path this one ends with."""
    if path in names:
        return names[path]
    for start in range(1, len(path)):
        found = names.get(("params", *path[start:]), ())
        if found and len(found) == ndim:
            return found
    return (None,) * ndim


def _row(path: tuple[str, ...], leaf: Any, sharding: NamedSharding, names: tuple) -> dict[str, Any]:
    mesh_axes = [*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec))]
    axes = ", ".join(_one_axis(name, over) for name, over in zip(names, mesh_axes, strict=True))
    on_host = " (host)" if sharding.memory_kind == HOST_MEMORY else ""
    return {
        "array": "/".join(path),
        "shape": " x ".join(map(str, leaf.shape)),
        "dtype": str(leaf.dtype),
        "axes": axes + on_host,
        "bytes a device": math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
    }


def _one_axis(name: str | None, over: str | tuple[str, ...] | None) -> str:
    """ "embed over fsdp"; "embed" where it is not sharded; "-" for an axis without a name."""
    used = (over,) if isinstance(over, str) else over or ()
    return " over ".join(filter(None, [name or "-", " x ".join(used)]))
