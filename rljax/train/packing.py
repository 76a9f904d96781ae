"""The texts of a batch side by side in rows of one width, for the update: the same sums from fewer columns.

A text is what one row holds up to its last decision, context included; rows without a decision are left out. Longest
first, each goes to the first row with room for it; then texts move from the fullest row to the emptiest until the two
differ by less than a text. Rows are dealt to bins, one for each device and micro-batch: in rounds, the fullest rows
first, in each round the row with the most attention (Σ n²) to the bin with the least. Hence for every bin

    tokens <= mean + longest text,    Σ n² <= mean + most in a row

Shapes: `rows` rows a device and micro-batch at most, and as many micro-batches as the texts take. The rows of a device
are 1 to 16, then steps of a sixteenth of the power of two below, so that few shapes compile, rounded up to whole
micro-batches.

After packing a row is not a sequence: facts of rows (`group`, `scores`, `baseline`) are None, and a weight or a loss
must go by segments (`ops.sequences`). `credit` comes before. A method that draws a number for each place of the batch
draws others. Left out: cutting a text.
"""

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from rljax.train.mesh import Shardings, data_parallel_size
from rljax.types import Array, Batch, check_shapes

OF_ROWS = ("group", "scores", "baseline")


def packed(make: Callable[[int], Callable], tokens: int, width: int, shardings: Shardings | None = None) -> Callable:
    """update(state, batch) -> (state, metrics) of packed batches: those of the update, and how much padding there was.

    Args:
      make: number of micro-batches -> update (`make_update`); called once for each number that comes up.
      tokens: columns a device computes at a time; width: of a row. Raises ValueError where no row fits.

    Adds `padding_before` and `padding_after`, the share of columns without text, and `micro_batches`.
    """
    if not 0 < width <= tokens:
        raise ValueError(f"{tokens} tokens at a time hold no row of {width}; legal: rows of 1 to {tokens}")
    make = lru_cache(maxsize=None)(make)
    devices = 1 if shardings is None else data_parallel_size(shardings.rows.mesh)
    measure = _texts if shardings is None else jax.jit(_texts, out_shardings=shardings.replicated)

    def update(state, batch):
        batch, micro_batches, shown = pack(batch, width, tokens // width, devices, measure)
        state, metrics = make(micro_batches)(state, batch)
        return state, metrics | shown | {"micro_batches": micro_batches}

    return update


def pack(
    batch: Batch, width: int, rows: int, devices: int = 1, measure: Callable | None = None
) -> tuple[Batch, int, dict[str, float]]:
    """The batch in rows of `width`, at most `rows` of them a device and micro-batch; and the number of micro-batches.

    Rows stand as `mesh` and `update` cut them: contiguous over devices, micro-batch m of M takes rows m, m + M, ...
    Each text is a segment, 1, 2, ... in its row; what stands in padding is unspecified.

    Raises ValueError for a batch without segments, with rows of several texts, with facts that are not [B T ...], and
    for a text longer than `width`.
    """
    if not isinstance(batch, Batch):
        raise ValueError(f"only a Batch is packed, after credit; not {type(batch).__name__}")
    check_shapes(batch)
    _check_facts(batch)
    first, length, whole = np.asarray((measure or _texts)(batch.traj.segments, batch.mask))
    if not whole.all():
        raise ValueError(
            f"row {whole.argmin()} is not one text of consecutive columns in one segment, decisions inside"
        )
    row, micro_batches, count = plan(length, width, rows, devices)
    source = np.full((count, width), -1, np.int32)
    segments = np.zeros((count, width), np.int32)
    for text in np.flatnonzero(length):
        start = np.argmax(source[row[text]] < 0)
        at = slice(start, start + length[text])
        source[row[text], at] = text * batch.mask.shape[1] + first[text] + np.arange(length[text])
        segments[row[text], at] = segments[row[text], start - 1] + 1
    before, after = (float(1.0 - length.sum() / size) for size in (batch.mask.size, source.size))
    return _gathered(batch, source, segments), micro_batches, {"padding_before": before, "padding_after": after}


def _check_facts(batch: Batch) -> None:
    if batch.traj.segments is None:
        raise ValueError("Trajectory.segments is None: they say where in its row a text stands")
    for path, leaf in jax.tree.leaves_with_path({"dist": batch.traj.dist, "extra": batch.extra}):
        if jnp.shape(leaf)[:2] != batch.mask.shape:
            name, want = jax.tree_util.keystr(path, simple=True, separator="."), batch.mask.shape
            raise ValueError(
                f"{name} has shape {jnp.shape(leaf)}; to be packed it must start {want}, decision by decision"
            )


@jax.jit
def _texts(segments: Array, mask: Array) -> Array:
    """[3 B]: first column of each row's text, its length (0 without a decision), 1 where it is one text, else 0."""
    inside, column = segments > 0, jnp.arange(mask.shape[1])[None]
    first = jnp.argmax(inside, axis=1)
    end = jnp.where(mask, column + 1, 0).max(axis=1)
    length = jnp.where(end > 0, end - first, 0)
    own = (column >= first[:, None]) & (column < end[:, None])
    same = segments == jnp.take_along_axis(segments, first[:, None], axis=1)
    whole = (jnp.where(own, inside & same, ~inside | same) & (inside | ~mask)).all(axis=1)
    return jnp.stack([first, length, whole.astype(first.dtype)])


# ------------------------------------------------------------------------------------------------- on the host: numpy


def plan(length: np.ndarray, width: int, rows: int, devices: int) -> tuple[np.ndarray, int, int]:
    """The row of each text, and the number of micro-batches and of rows in all."""
    if length.max() > width:
        raise ValueError(f"row {length.argmax()} holds a text of {length.max()} decisions; a packed row holds {width}")
    texts, of_device = np.flatnonzero(length), 1
    while True:
        micro_batches = -(-of_device // rows)
        bins, each = devices * micro_batches, -(-of_device // micro_batches)
        found = _first_fit(length[texts], width, bins * each)
        if found is not None:
            break
        of_device += 2 ** max(of_device.bit_length() - 5, 0)
    row = np.zeros(len(length), np.int64)
    row[texts] = _level(found, length[texts], bins * each)
    tokens, work = (np.bincount(row, length.astype(float) ** power, bins * each) for power in (1, 2))
    bin_of, turn = _deal(tokens, work, bins)
    device, micro_batch = np.divmod(bin_of, micro_batches)
    place = (device * each + turn) * micro_batches + micro_batch
    return place[row], micro_batches, bins * each


def _first_fit(length: np.ndarray, width: int, rows: int) -> np.ndarray | None:
    """A row for each text, longest first to the first row with room for it. None where one finds none."""
    if length.sum() > rows * width:
        return None
    row, room = np.zeros(len(length), np.int64), np.full(rows, width)
    for text in np.argsort(-length, kind="stable"):
        row[text] = np.argmax(room >= length[text])
        room[row[text]] -= length[text]
        if room[row[text]] < 0:
            return None
    return row


def _level(row: np.ndarray, length: np.ndarray, rows: int) -> np.ndarray:
    """The rows after moves from the fullest to the emptiest, until none makes the two more alike.

    A text shorter than their difference fits, so in the end they differ by no more than the fullest one's shortest.
    """
    row, tokens = row.copy(), np.bincount(row, length, rows)
    while True:
        fullest, emptiest = tokens.argmax(), tokens.argmin()
        gap = tokens[fullest] - tokens[emptiest]
        (movable,) = np.nonzero((row == fullest) & (length < gap))
        if not len(movable):
            return row
        moved = movable[np.abs(2 * length[movable] - gap).argmin()]
        row[moved] = emptiest
        tokens[[fullest, emptiest]] += [-length[moved], length[moved]]


def _deal(tokens: np.ndarray, work: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """A bin for each row, and which of the bin's rows it is.

    A round deals `bins` rows, the fullest first, so the tokens of two bins differ by no more than those of two rows.
    Within a round the row with the most work goes to the bin with the least so far.
    """
    rounds = np.argsort(-tokens, kind="stable").reshape(-1, bins)
    bin_of, turn, done = np.zeros(len(tokens), np.int64), np.zeros(len(tokens), np.int64), np.zeros(bins)
    for k, dealt in enumerate(rounds):
        heaviest, idlest = dealt[np.argsort(-work[dealt], kind="stable")], np.argsort(done, kind="stable")
        bin_of[heaviest], turn[heaviest] = idlest, k
        done[idlest] += work[heaviest]
    return bin_of, turn


# ------------------------------------------------------------------------------------------------------- on the device


@jax.jit
def _gathered(batch: Batch, source: Array, segments: Array) -> Batch:
    """In each place the decision `source` of the flattened batch; below 0 there is none."""
    B, T = batch.mask.shape
    there = source >= 0

    def take(x):
        return x.reshape(B * T, *x.shape[2:])[jnp.maximum(source, 0)]

    traj = batch.traj.replace(**dict.fromkeys(OF_ROWS))
    if traj.values is not None:
        traj = traj.replace(values=traj.values[:, :-1])
    moved = jax.tree.map(take, batch.replace(traj=traj, coefficients={}))
    facts = {"segments": segments, "mask": moved.traj.mask & there}
    if traj.values is not None:
        facts["values"] = jnp.pad(moved.traj.values, ((0, 0), (0, 1)))
    return moved.replace(traj=moved.traj.replace(**facts), mask=moved.mask & there, coefficients=batch.coefficients)
