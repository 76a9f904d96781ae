"""The sequences of a batch packed side by side in rows of one width, for the update: the same sums from fewer columns.

A sequence is what one row holds up to its last decision, context included; rows without a decision are left out. The
longest first, each goes to the first row with room for it; then sequences move from the fullest row to the emptiest
until the two differ by less than a sequence. Rows are dealt to bins, one for each device and micro-batch: in rounds,
the fullest rows first, in each round the row with the most attention work (Σ n²) to the bin with the least. Hence for
every bin

    tokens <= mean + longest sequence,    Σ n² <= mean + most in a row

Shapes: at most `rows` rows for each device and micro-batch, and as many micro-batches as the sequences need. The rows
of a device are 1 to 16, then steps of a sixteenth of the power of two below, so that few shapes compile, rounded up to
whole micro-batches.

After packing a row is not a sequence: `group` holds an id for each column, the other fields of rows (`scores`,
`baseline`) are None, and a weight or a loss must go by segments (`ops.sequences`). `credit` comes before packing. A
method that draws random numbers for each column of the batch draws others. Left out: splitting a sequence.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rljax.ops.first_fit import first_fit_decreasing
from rljax.train.mesh import Shardings, data_parallel_size
from rljax.train.update import UpdateFn
from rljax.types import Array, Batch, TrainState, check_shapes

ROW_FIELDS = ("scores", "reward_weights", "baseline")

MeasureFn = Callable[[Array, Array], Array]  # (segments, mask) -> [3 B], see _measure_sequences


def make_packed_update(
    make: Callable[[int], UpdateFn], tokens: int, width: int, shardings: Shardings | None = None
) -> UpdateFn:
    """update(state, batch) -> (state, metrics) on packed batches.

    Adds the metrics `padding_before` and `padding_after`, the fraction of columns without a token, and `micro_batches`.

    Args:
      make: number of micro-batches -> update (`make_update`); called once for each number that occurs.
      tokens: columns that a device computes at a time; width: of a row. Raises ValueError where no row fits.
    """
    if not 0 < width <= tokens:
        raise ValueError(f"{tokens} tokens at a time hold no row of {width}; legal: at least {max(width, 1)} tokens")
    make = lru_cache(maxsize=None)(make)
    if shardings is None:
        devices = 1
        measure = _measure_sequences
    else:
        devices = data_parallel_size(shardings.rows.mesh)
        measure = jax.jit(_measure_sequences, out_shardings=shardings.replicated)

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        batch, micro_batches, padding = pack_batch(batch, width, tokens // width, devices, measure)
        state, metrics = make(micro_batches)(state, batch)
        return state, {**metrics, **padding, "micro_batches": micro_batches}

    return update


def pack_batch(
    batch: Batch, width: int, rows: int, devices: int = 1, measure: MeasureFn | None = None
) -> tuple[Batch, int, dict[str, float]]:
    """The batch in rows of `width`, at most `rows` of them for each device and micro-batch.

    Rows are in the order in which `mesh` and `update` cut them: contiguous over devices, micro-batch m of M takes rows
    m, m + M, ... Each sequence is a segment, 1, 2, ... in its row; the content of padding is unspecified.

    Returns: the packed batch, the number of micro-batches, and the metrics `padding_before` and `padding_after`.
    Raises ValueError for a batch without segments, with several sequences in a row, with fields that are not
    [B T ...], and for a sequence longer than `width`.
    """
    if not isinstance(batch, Batch):
        raise ValueError(f"only a Batch is packed, after credit; not {type(batch).__name__}")
    check_shapes(batch)
    _check_fields(batch)
    measured = np.asarray((measure or _measure_sequences)(batch.traj.segments, batch.mask))
    first, length, is_one_sequence = measured
    if not is_one_sequence.all():
        raise ValueError(
            f"row {is_one_sequence.argmin()} is not one sequence: consecutive columns of one segment, decisions inside"
        )
    row, micro_batches, count = plan_rows(length, width, rows, devices)
    source, segments = _place_sequences(row, first, length, (count, width), columns=batch.mask.shape[1])
    padding = {
        "padding_before": float(1.0 - length.sum() / batch.mask.size),
        "padding_after": float(1.0 - length.sum() / source.size),
    }
    return _gather(batch, source, segments), micro_batches, padding


def _check_fields(batch: Batch) -> None:
    if batch.traj.prefix is not None:
        raise ValueError("Trajectory.prefix is there: a batch is packed before its prefixes are cut off")
    if batch.traj.segments is None:
        raise ValueError("Trajectory.segments is None: they say where in its row a sequence is")
    want = batch.mask.shape
    for path, leaf in jax.tree.leaves_with_path({"dist": batch.traj.dist, "extra": batch.extra}):
        if jnp.shape(leaf)[:2] != want:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"{name} has shape {jnp.shape(leaf)}; to be packed it must start {want}, decision by decision"
            )


@jax.jit
def _measure_sequences(segments: Array, mask: Array) -> Array:
    """[3 B]: first column of each row's sequence, its length (0 without a decision), and 1 where the row is legal.

    Legal is one sequence of consecutive columns in one segment, with all decisions inside; else 0.
    """
    inside = segments > 0
    column = jnp.arange(mask.shape[1])[None]
    first = jnp.argmax(inside, axis=1)
    end = jnp.where(mask, column + 1, 0).max(axis=1)
    length = jnp.where(end > 0, end - first, 0)
    in_sequence = (column >= first[:, None]) & (column < end[:, None])
    same_segment = segments == jnp.take_along_axis(segments, first[:, None], axis=1)
    legal_column = jnp.where(in_sequence, inside & same_segment, ~inside | same_segment) & (inside | ~mask)
    return jnp.stack([first, length, legal_column.all(axis=1).astype(first.dtype)])


# ------------------------------------------------------------------------------------------------- on the host: numpy


def plan_rows(length: np.ndarray, width: int, rows: int, devices: int) -> tuple[np.ndarray, int, int]:
    """The row of each sequence, the number of micro-batches, and the number of rows in total."""
    if length.max() > width:
        raise ValueError(
            f"row {length.argmax()} holds a sequence of {length.max()} decisions; a packed row holds {width}"
        )
    sequences = np.flatnonzero(length)
    lengths = length[sequences]
    rows_per_device = 1
    while True:
        micro_batches = -(-rows_per_device // rows)
        rows_per_bin = -(-rows_per_device // micro_batches)
        bins = devices * micro_batches
        fitted = first_fit_decreasing(lengths.tolist(), width, bins * rows_per_bin)
        if fitted is not None:
            break
        rows_per_device += 2 ** max(rows_per_device.bit_length() - 5, 0)
    row = np.zeros(len(length), np.int64)
    row[sequences] = _balance_rows(np.array(fitted, np.int64), lengths, bins * rows_per_bin)
    tokens = np.bincount(row, length.astype(float), bins * rows_per_bin)
    work = np.bincount(row, length.astype(float) ** 2, bins * rows_per_bin)
    bin_of_row, place_in_bin = _deal_rows(tokens, work, bins)
    device, micro_batch = np.divmod(bin_of_row, micro_batches)
    position = (device * rows_per_bin + place_in_bin) * micro_batches + micro_batch
    return position[row], micro_batches, bins * rows_per_bin


def _balance_rows(row: np.ndarray, length: np.ndarray, rows: int) -> np.ndarray:
    """The rows after moves from the fullest to the emptiest, until no move makes the two more equal.

    A sequence shorter than their difference fits, so in the end they differ by at most the shortest of the fullest row.
    """
    row = row.copy()
    tokens = np.bincount(row, length, rows)
    while True:
        fullest = tokens.argmax()
        emptiest = tokens.argmin()
        gap = tokens[fullest] - tokens[emptiest]
        (movable,) = np.nonzero((row == fullest) & (length < gap))
        if not len(movable):
            return row
        moved = movable[np.abs(2 * length[movable] - gap).argmin()]
        row[moved] = emptiest
        tokens[fullest] -= length[moved]
        tokens[emptiest] += length[moved]


def _deal_rows(tokens: np.ndarray, work: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """A bin for each row, and which of the bin's rows it is.

    A round deals `bins` rows, the fullest first, so the tokens of two bins differ by at most those of two rows. Within
    a round the row with the most work goes to the bin with the least so far.
    """
    rounds = np.argsort(-tokens, kind="stable").reshape(-1, bins)
    bin_of_row = np.zeros(len(tokens), np.int64)
    place_in_bin = np.zeros(len(tokens), np.int64)
    work_of_bin = np.zeros(bins)
    for k, dealt in enumerate(rounds):
        most_work_first = dealt[np.argsort(-work[dealt], kind="stable")]
        least_loaded_first = np.argsort(work_of_bin, kind="stable")
        bin_of_row[most_work_first] = least_loaded_first
        place_in_bin[most_work_first] = k
        work_of_bin[least_loaded_first] += work[most_work_first]
    return bin_of_row, place_in_bin


def _place_sequences(
    row: np.ndarray, first: np.ndarray, length: np.ndarray, shape: tuple[int, int], columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each column of the packed rows: the decision of the flattened batch that it holds, or -1; and its segment."""
    source = np.full(shape, -1, np.int32)
    segments = np.zeros(shape, np.int32)
    for sequence in np.flatnonzero(length):
        target = row[sequence]
        start = np.argmax(source[target] < 0)
        span = slice(start, start + length[sequence])
        source[target, span] = sequence * columns + first[sequence] + np.arange(length[sequence])
        segments[target, span] = segments[target, start - 1] + 1
    return source, segments


# ------------------------------------------------------------------------------------------------------- on the device


@jax.jit
def _gather(batch: Batch, source: Array, segments: Array) -> Batch:
    """In each column the decision `source` of the flattened batch; below 0 there is none."""
    B, T = batch.mask.shape
    is_filled = source >= 0

    def take(x: Array) -> Array:
        return x.reshape(B * T, *x.shape[2:])[jnp.maximum(source, 0)]

    traj = batch.traj.replace(**dict.fromkeys(ROW_FIELDS))
    if traj.group is not None:
        of_columns = traj.group if traj.group.ndim == 2 else traj.group[:, None]
        traj = traj.replace(group=jnp.broadcast_to(of_columns, (B, T)))
    if traj.values is not None:
        traj = traj.replace(values=traj.values[:, :-1])
    moved = jax.tree.map(take, batch.replace(traj=traj, coefficients={}))
    fields = {"segments": segments, "mask": moved.traj.mask & is_filled}
    if traj.values is not None:
        fields["values"] = jnp.pad(moved.traj.values, ((0, 0), (0, 1)))
    packed_traj = moved.traj.replace(**fields)
    return moved.replace(traj=packed_traj, mask=moved.mask & is_filled, coefficients=batch.coefficients)
