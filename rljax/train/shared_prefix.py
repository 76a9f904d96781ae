"""A prompt computed once for all its completions, in the forward and the backward pass of the update.

The rows of a group begin with the same columns. `share_prefix` cuts them off and keeps one copy (`Trajectory.prefix`);
a decoder runs it once, the rows attend to its keys and values, and gradients of all rows flow into it. The numbers are
those of the whole rows to rounding; P·L columns are computed in place of B·L, and log-probs of the rest only.

Hydragen (arXiv:2402.05099) shares prefixes in decoding. A method that draws random numbers for each column of the batch
draws others.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rljax.train.mesh import Shardings, data_parallel_size
from rljax.train.packing import ROW_FIELDS
from rljax.train.update import UpdateFn
from rljax.types import Array, Batch, Pairs, SharedPrefix, TrainState, Trajectory

OF_ROWS = ("group", *ROW_FIELDS)  # of a row, not of its columns


def make_shared_prefix_update(
    update: UpdateFn, columns: int, group_size: int, shardings: Shardings | None = None
) -> UpdateFn:
    """update(state, batch) -> (state, metrics) that computes the first `columns` once for `group_size` rows, or for the
    two completions of each of `Pairs`.

    A batch whose rows do not share them (shuffled minibatches, completions carried over from an earlier step) is
    updated as it is. Adds the metric `shared_prefix`: 1 where they were shared, else 0.
    """
    if columns < 1 or group_size < 1:
        raise ValueError(f"columns = {columns}, group_size = {group_size}; legal: at least 1 each")
    devices = 1 if shardings is None else data_parallel_size(shardings.rows.mesh)

    def update_sharing(state: TrainState, batch: Batch | Pairs) -> tuple[TrainState, dict[str, Any]]:
        if isinstance(batch, Pairs):
            shared = bool(is_prefix_of_pairs(batch, columns))
            cut = share_prefix_of_pairs(batch, columns) if shared else batch
        else:
            groups, rest = divmod(len(batch.mask), group_size)
            whole_groups = rest == 0 and groups % devices == 0
            shared = whole_groups and bool(is_prefix_shared(batch.traj, columns, group_size))
            cut = share_prefix(batch, columns, group_size) if shared else batch
        state, metrics = update(state, cut)
        return state, {**metrics, "shared_prefix": float(shared)}

    return update_sharing


@partial(jax.jit, static_argnames=("columns", "group_size"))
def is_prefix_shared(traj: Trajectory, columns: int, group_size: int) -> Array:
    """Whether the first `columns` of each `group_size` neighboring rows are the same, and hold no decision. bool []"""
    same = ~traj.mask[:, :columns].any()
    for field in (traj.inputs, traj.positions, traj.segments):
        by_group = field[:, :columns].reshape(-1, group_size, columns)
        same &= (by_group == by_group[:, :1]).all()
    return same


@partial(jax.jit, static_argnames=("columns", "group_size"))
def share_prefix(batch: Batch, columns: int, group_size: int) -> Batch:
    """The batch without its first `columns`, which `traj.prefix` holds once for each `group_size` neighboring rows.

    The rows must have them in common, and no decision in them (`is_prefix_shared`).
    """
    traj = cut_columns(batch.traj, columns).replace(prefix=prefix_of(batch.traj, columns, group_size))
    rest = jax.tree.map(lambda x: x[:, columns:], batch.replace(traj=None, coefficients={}))
    return rest.replace(traj=traj, coefficients=batch.coefficients)


def prefix_of(traj: Trajectory, columns: int, group_size: int) -> SharedPrefix:
    """The first columns of the first of each `group_size` rows."""

    def first_of_group(x: Array | None) -> Array | None:
        return None if x is None else x[::group_size, :columns]

    fields = {name: first_of_group(getattr(traj, name)) for name in ("inputs", "positions", "segments", "routing")}
    return SharedPrefix(**fields)


def cut_columns(traj: Trajectory, columns: int) -> Trajectory:
    """The trajectory without its first columns."""
    of_rows = {name: getattr(traj, name) for name in OF_ROWS}
    of_columns = traj.replace(**dict.fromkeys(OF_ROWS))
    return jax.tree.map(lambda x: x[:, columns:], of_columns).replace(**of_rows)


@partial(jax.jit, static_argnames="columns")
def is_prefix_of_pairs(pairs: Pairs, columns: int) -> Array:
    """Whether the two completions of each pair have the first columns in common, and no decision in them. bool []

    False too where they differ in width or in the facts they have, or come with a third one.
    """
    chosen = pairs.chosen
    rejected = pairs.rejected
    same_shapes = jax.tree.map(jnp.shape, chosen) == jax.tree.map(jnp.shape, rejected)
    if not same_shapes or pairs.gold is not None:
        return jnp.zeros((), bool)
    same = ~(chosen.mask[:, :columns] | rejected.mask[:, :columns]).any()
    for name in ("inputs", "positions", "segments"):
        same &= (getattr(chosen, name)[:, :columns] == getattr(rejected, name)[:, :columns]).all()
    return same


@partial(jax.jit, static_argnames="columns")
def share_prefix_of_pairs(pairs: Pairs, columns: int) -> Pairs:
    """Pairs without their first columns, which are the prefix of both completions.

    They must have them in common, and no decision in them (`is_prefix_of_pairs`).
    """
    prefix = prefix_of(pairs.chosen, columns, group_size=1)
    chosen = cut_columns(pairs.chosen, columns).replace(prefix=prefix)
    rejected = cut_columns(pairs.rejected, columns).replace(prefix=prefix)
    return pairs.replace(chosen=chosen, rejected=rejected)


def with_own_prefixes(batch: Batch) -> Batch:
    """The batch with a copy of the prefix for each row, so that rows can be taken one by one."""
    prefix = batch.traj.prefix
    if prefix is None:
        return batch
    n = len(batch.mask) // len(prefix.inputs)
    copies = jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), prefix)
    return batch.replace(traj=batch.traj.replace(prefix=copies))
