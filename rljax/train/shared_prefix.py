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

from rljax.train.mesh import Shardings, data_parallel_size, row_shapes, shard_rows
from rljax.train.update import UpdateFn
from rljax.types import AnnotateFn, Array, Batch, Pairs, SharedPrefix, TrainState, Trajectory

ROW_FIELDS = ("scores", "reward_weights", "baseline")  # of a row, and meaningless for several sequences in one
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

    def lower(state: TrainState, batch: Batch):
        """The program of a call, for a state and a batch of shapes whose rows share their prefix."""
        cut = jax.eval_shape(partial(share_prefix, columns=columns, group_size=group_size), batch)
        return update.lower(state, cut if shardings is None else row_shapes(shardings, cut))

    update_sharing.lower = lower
    return update_sharing


@partial(jax.jit, static_argnames=("columns", "group_size"))
def is_prefix_shared(traj: Trajectory, columns: int, group_size: int) -> Array:
    """Whether the first `columns` of each `group_size` neighboring rows are the same, and hold no decision. bool []"""
    if traj.inputs.shape[1] <= columns:  # rows of shorter prompts, as an evaluation may have
        return jnp.array(False)
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


def make_shared_prefix_annotate(
    annotate: AnnotateFn, columns: int, group_size: int, rows_at_once: int, shardings: Shardings | None = None
) -> AnnotateFn:
    """annotate(state, traj) -> traj, with at most `rows_at_once` rows at a time, any number of them in all.

    The first `columns` are computed once for `group_size` rows. The fields that it fills are 0 in those columns, where
    no decision is. Rows that do not share them (completions carried over from an earlier step) are annotated whole.
    Pieces are of one shape, and divide over the devices: copies of the first rows fill them up.
    """
    devices = 1 if shardings is None else data_parallel_size(shardings.rows.mesh)

    def cut(traj: Trajectory, shared: bool) -> list[Trajectory]:
        size = group_size if shared else 1
        pieces, fill = _cut_evenly(len(traj.mask), rows_at_once, size * devices)
        if fill:
            traj = _with_copies(traj, fill)
        if shared:
            traj = share_prefix(Batch(traj, traj.logp, traj.mask), columns, group_size).traj
        return _every_nth_group(traj, pieces, size) if pieces > 1 else [traj]

    def annotate_in_pieces(state: TrainState, traj: Trajectory) -> Trajectory:
        rows = len(traj.mask)
        whole_groups = columns > 0 and rows % group_size == 0
        shared = whole_groups and bool(is_prefix_shared(traj, columns, group_size))
        pieces = cut(traj, shared)
        if shardings is not None:
            pieces = shard_rows(shardings, pieces)
        filled = [_filled_fields(piece, annotate(state, piece)) for piece in pieces]
        fields = _in_order_of_groups(filled, group_size if shared else 1) if len(filled) > 1 else filled[0]
        if shared:
            fields = {name: _pad_columns(value, columns) for name, value in fields.items()}
        return traj.replace(**{name: value[:rows] for name, value in fields.items()})

    def lower(state: TrainState, traj: Trajectory):
        """The program of each piece of a call, for a state and a trajectory of shapes whose rows share their prefix."""
        piece = jax.eval_shape(partial(cut, shared=columns > 0), traj)[0]
        return annotate.lower(state, piece if shardings is None else row_shapes(shardings, piece))

    annotate_in_pieces.lower = lower
    return annotate_in_pieces


def _cut_evenly(rows: int, rows_at_once: int, unit: int) -> tuple[int, int]:
    """In how many pieces to cut the rows, and how many to add so that these are equal and multiples of `unit`."""
    pieces = -(-rows // max(rows_at_once, unit))
    rows_of_piece = -(-rows // (pieces * unit)) * unit
    return pieces, pieces * rows_of_piece - rows


@partial(jax.jit, static_argnames="count")
def _with_copies(traj: Trajectory, count: int) -> Trajectory:
    """The trajectory and `count` rows more, which repeat it from the first row on."""
    rows = len(traj.mask)
    return jax.tree.map(lambda x: x[jnp.arange(rows + count) % rows], traj)


@partial(jax.jit, static_argnames=("pieces", "group_size"))
def _every_nth_group(traj: Trajectory, pieces: int, group_size: int) -> list[Trajectory]:
    """Piece m has groups m, m + pieces, ...: rows that are laid out contiguously over devices stay where they are."""
    groups = len(traj.mask) // group_size

    def take(x: Array, piece: int) -> Array:
        by_group = x.reshape(groups, len(x) // groups, *x.shape[1:])[piece::pieces]
        return by_group.reshape(-1, *x.shape[1:])

    return [jax.tree.map(partial(take, piece=piece), traj) for piece in range(pieces)]


@partial(jax.jit, static_argnames="group_size")
def _in_order_of_groups(pieces: list[dict[str, Array]], group_size: int) -> dict[str, Array]:
    """The inverse of `_every_nth_group`, of each field."""

    def join(*parts: Array) -> Array:
        by_group = [part.reshape(-1, group_size, *part.shape[1:]) for part in parts]
        return jnp.stack(by_group, axis=1).reshape(-1, *parts[0].shape[1:])

    return jax.tree.map(join, *pieces)


def _filled_fields(before: Trajectory, after: Trajectory) -> dict[str, Array]:
    """The fields of a trajectory that are not those it had before."""
    return {name: value for name, value in vars(after).items() if value is not getattr(before, name)}


def _pad_columns(x: Array, columns: int) -> Array:
    return jnp.pad(x, ((0, 0), (columns, 0)) + ((0, 0),) * (x.ndim - 2))


def with_own_prefixes(batch: Batch) -> Batch:
    """The batch with a copy of the prefix for each row, so that rows can be taken one by one."""
    prefix = batch.traj.prefix
    if prefix is None:
        return batch
    n = len(batch.mask) // len(prefix.inputs)
    copies = jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), prefix)
    return batch.replace(traj=batch.traj.replace(prefix=copies))
