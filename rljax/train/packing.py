"""The sequences of a batch packed side by side in rows of one width, for the update: the same sums from fewer columns.

A sequence is what one row holds up to its last decision, context included; rows without a decision are left out. The
longest first, each goes to the first row with room for it; then sequences move from the fullest row to the emptiest
until the two differ by less than a sequence. Rows are dealt to bins, one for each device and micro-batch: in rounds,
the fullest rows first, in each round the row with the most attention work (Σ n²) to the bin with the least. Hence for
every bin

    tokens <= mean + longest sequence,    Σ n² <= mean + most in a row

Where the completions of a prompt are neighbors, the prompt is there once for as many of them as fit beside it in a row
(`Trajectory.context`): such a bundle then takes the place of a sequence. A completion attends to its prompt and to
itself, so the numbers are those of whole rows to rounding. Where bundles would take no fewer rows than sequences, these
are packed.

Shapes: at most `rows` rows for each device and micro-batch, and as many micro-batches as the sequences need. The rows
of a device are 1 to 16, then steps of a sixteenth of the power of two below, so that few shapes compile, rounded up to
whole micro-batches.

After packing a row is not a sequence: `group` holds an id for each column, the other fields of rows (`scores`,
`baseline`) are None, and a weight or a loss must go by segments (`ops.sequences`). `credit` comes before packing. A
method that draws random numbers for each column of the batch draws others. Left out: splitting a sequence.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rljax.ops.first_fit import first_fit_decreasing
from rljax.train.mesh import Shardings, data_parallel_size
from rljax.train.shared_prefix import ROW_FIELDS, is_prefix_shared
from rljax.train.update import UpdateFn
from rljax.types import Array, Batch, TrainState, check_shapes

MeasureFn = Callable[[Array, Array], Array]  # (segments, mask) -> [3 B], see _measure_sequences


class SharedColumns(NamedTuple):
    """The first columns of each so many neighboring rows, which hold one prompt and no decision."""

    columns: int
    group_size: int


class Pieces(NamedTuple):
    """Runs of columns of the batch, in the order in which packed rows hold them. Each field has an entry for each."""

    bundle: np.ndarray  # what stays together in a row, numbered from 0
    row: np.ndarray  # of the batch
    first: np.ndarray  # its first column
    length: np.ndarray  # number of columns
    is_prompt: np.ndarray  # bool: the pieces after it in its bundle continue it

    @property
    def bundle_lengths(self) -> np.ndarray:
        """Columns of each bundle."""
        return np.bincount(self.bundle, self.length).astype(np.int64)


def make_packed_update(
    make: Callable[[int], UpdateFn],
    tokens: int,
    width: int,
    shardings: Shardings | None = None,
    shared: SharedColumns | None = None,
) -> UpdateFn:
    """update(state, batch) -> (state, metrics) on packed batches.

    Adds the metrics `padding_before` and `padding_after`, the fraction of columns without a token, and `micro_batches`.

    Args:
      make: number of micro-batches -> update (`make_update`); called once for each number that occurs.
      tokens: columns that a device computes at a time; width: of a row. Raises ValueError where no row fits.
      shared: what rows have in common, computed once where they do; adds the metric `shared_prefix`, 1 there, else 0.
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
        batch, micro_batches, added = pack_batch(batch, width, tokens // width, devices, measure, shared)
        state, metrics = make(micro_batches)(state, batch)
        return state, {**metrics, **added, "micro_batches": micro_batches}

    return update


def pack_batch(
    batch: Batch,
    width: int,
    rows: int,
    devices: int = 1,
    measure: MeasureFn | None = None,
    shared: SharedColumns | None = None,
) -> tuple[Batch, int, dict[str, float]]:
    """The batch in rows of `width`, at most `rows` of them for each device and micro-batch.

    Rows are in the order in which `mesh` and `update` cut them: contiguous over devices, micro-batch m of M takes rows
    m, m + M, ... Each sequence is a segment, 1, 2, ... in its row, and so are a prompt that is there once and each
    completion whose `context` it is; the content of padding is unspecified.

    Returns: the packed batch, the number of micro-batches, and the metrics `padding_before`, `padding_after` and, with
    `shared`, `shared_prefix`.
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
    if length.max() > width:
        raise ValueError(
            f"row {length.argmax()} holds a sequence of {length.max()} decisions; a packed row holds {width}"
        )
    choices = [_sequences(first, length)]
    if shared is not None and _has_shared_columns(batch, shared):
        choices.append(_bundles(first, length, width, shared))
    plans = [(*plan_rows(pieces.bundle_lengths, width, rows, devices), pieces) for pieces in choices]
    row, micro_batches, count, pieces = min(plans, key=lambda plan: plan[2])  # of equal ones the sequences
    source, segments, context = _place_pieces(row, pieces, (count, width), columns=batch.mask.shape[1])
    added = {
        "padding_before": float(1.0 - length.sum() / batch.mask.size),
        "padding_after": float((source < 0).mean()),
    }
    if shared is None:
        context = None
    else:  # an array even where no prompt is shared this time: another program would have to be compiled
        added["shared_prefix"] = float(pieces.is_prompt.any())
    return _gather(batch, source, segments, context), micro_batches, added


def _has_shared_columns(batch: Batch, shared: SharedColumns) -> bool:
    """Whether the rows are whole groups that begin alike, as shuffled minibatches and older completions do not."""
    whole_groups = len(batch.mask) % shared.group_size == 0
    return whole_groups and bool(is_prefix_shared(batch.traj, shared.columns, shared.group_size))


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


def _sequences(first: np.ndarray, length: np.ndarray) -> Pieces:
    """Each sequence by itself."""
    (row,) = np.nonzero(length)
    return Pieces(np.arange(len(row)), row, first[row], length[row], np.zeros(len(row), bool))


def _bundles(first: np.ndarray, length: np.ndarray, width: int, shared: SharedColumns) -> Pieces:
    """Each prompt with as many of its completions as a row of `width` holds, and again for the rest of them."""
    pieces = []
    bundle = 0
    for start in range(0, len(length), shared.group_size):
        group = start + np.flatnonzero(length[start : start + shared.group_size])
        if not len(group):
            continue
        one = group[0]  # the first columns of all are the same, but those of a row without a token begin nowhere
        prompt = max(0, shared.columns - int(first[one]))
        completions = length[group] - prompt
        bundle_of_row = _fewest_rows(completions, width - prompt) if prompt else np.arange(len(group))
        for number in np.unique(bundle_of_row):
            if prompt:
                pieces.append((bundle, one, first[one], prompt, True))
            for k in np.flatnonzero(bundle_of_row == number):
                pieces.append((bundle, group[k], first[group[k]] + prompt, completions[k], False))
            bundle += 1
    *numbers, is_prompt = np.array(pieces, np.int64).reshape(-1, len(Pieces._fields)).T
    return Pieces(*numbers, is_prompt.astype(bool))


def _fewest_rows(lengths: np.ndarray, width: int) -> np.ndarray:
    """The row of each length by first fit, in as few rows as that takes."""
    rows = -(-int(lengths.sum()) // width)
    while (fitted := first_fit_decreasing(lengths.tolist(), width, rows)) is None:
        rows += 1
    return np.array(fitted, np.int64)


def plan_rows(length: np.ndarray, width: int, rows: int, devices: int) -> tuple[np.ndarray, int, int]:
    """The row of each sequence, the number of micro-batches, and the number of rows in total.

    `length` [N], each at most `width`; one of 0 takes no place.
    """
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


def _place_pieces(
    row_of_bundle: np.ndarray, pieces: Pieces, shape: tuple[int, int], columns: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each column of the packed rows: the decision of the flattened batch that it holds, or -1; its segment; and
    the segment that this one continues, or 0.
    """
    source = np.full(shape, -1, np.int32)
    segments = np.zeros(shape, np.int32)
    context = np.zeros(shape, np.int32)
    filled = np.zeros(shape[0], np.int64)  # columns of each row
    segment = np.zeros(shape[0], np.int32)  # the last one of each row
    prompt_of_bundle = np.zeros(len(row_of_bundle), np.int32)
    for bundle, row, first, length, is_prompt in zip(*pieces, strict=True):
        target = row_of_bundle[bundle]
        span = slice(filled[target], filled[target] + length)
        filled[target] += length
        segment[target] += 1
        source[target, span] = row * columns + first + np.arange(length)
        segments[target, span] = segment[target]
        context[target, span] = prompt_of_bundle[bundle]
        if is_prompt:
            prompt_of_bundle[bundle] = segment[target]
    return source, segments, context


# ------------------------------------------------------------------------------------------------------- on the device


@jax.jit
def _gather(batch: Batch, source: Array, segments: Array, context: Array | None) -> Batch:
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
    fields = {"segments": segments, "context": context, "mask": moved.traj.mask & is_filled}
    if traj.values is not None:
        fields["values"] = jnp.pad(moved.traj.values, ((0, 0), (0, 1)))
    packed_traj = moved.traj.replace(**fields)
    return moved.replace(traj=packed_traj, mask=moved.mask & is_filled, coefficients=batch.coefficients)
