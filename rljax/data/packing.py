"""Demonstrations packed side by side in rows of one width: the same sums as `demonstrations`, with less padding.

Packed by first fit decreasing (`ops.first_fit`). Segments keep demonstrations apart: no token sees another
demonstration, positions restart, and the first token of a segment is no target. Sums over tokens and over sequences
equal those of unpacked rows.

Left out: splitting a demonstration that is too long, and a fixed number of rows (each new number compiles once).
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from rljax.data.examples import Example
from rljax.ops.first_fit import first_fit_decreasing
from rljax.types import Trajectory, trajectory_of_tokens


def pack_demonstrations(demonstrations: Sequence[Example], width: int, pad: int = 0) -> Trajectory:
    """Demonstrations in rows of `width` tokens (width - 1 decisions), numbered 1, 2, ... in `segments` of each row.

    Decisions are the tokens that the mask of an example marks. Rows hold several prompts, so `group` is None. A
    demonstration without a prompt loses its first token as a target.

    Raises ValueError for no demonstrations, and for one that is longer than `width` or has no tokens.
    """
    row_of = _assign_rows(demonstrations, width)
    count = max(row_of) + 1
    tokens = np.full((count, width), pad, np.int32)
    segments = np.zeros((count, width), np.int32)
    chosen = np.zeros((count, width), bool)
    filled = [0] * count  # tokens of each row
    members = [0] * count  # demonstrations of each row
    for index in _longest_first(demonstrations):
        prompt, completion, mask, _ = demonstrations[index]
        row = row_of[index]
        start = filled[row]
        middle = start + len(prompt)
        end = middle + len(completion)
        members[row] += 1
        tokens[row, start:end] = [*prompt, *completion]
        segments[row, start:end] = members[row]
        chosen[row, middle:end] = mask
        filled[row] = end
    ones = jnp.ones(tokens.shape)
    return trajectory_of_tokens(tokens, segments, jnp.asarray(chosen), jnp.zeros(tokens.shape), temperature=ones)


def padding_fractions(demonstrations: Sequence[Example], width: int) -> tuple[float, float]:
    """Fraction of padding among the tokens computed: unpacked, in rows as wide as the longest one; and packed."""
    lengths = _lengths(demonstrations)
    rows = max(_assign_rows(demonstrations, width)) + 1
    unpacked = 1.0 - sum(lengths) / (len(lengths) * max(lengths))
    packed = 1.0 - sum(lengths) / (rows * width)
    return unpacked, packed


def _lengths(demonstrations: Sequence[Example]) -> list[int]:
    return [len(example.prompt) + len(example.completion) for example in demonstrations]


def _longest_first(demonstrations: Sequence[Example]) -> list[int]:
    """Indices by decreasing length; equal ones in their own order."""
    lengths = _lengths(demonstrations)
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])


def _assign_rows(demonstrations: Sequence[Example], width: int) -> list[int]:
    """The row of each demonstration."""
    if not demonstrations:
        raise ValueError("there are no demonstrations: at least one is needed")
    lengths = _lengths(demonstrations)
    for index, length in enumerate(lengths):
        if not 0 < length <= width:
            raise ValueError(f"demonstration {index} has {length} tokens; a row holds from 1 to {width}")
    rows = first_fit_decreasing(lengths, width, max_rows=len(lengths))
    assert rows is not None  # one row for each would do
    return rows
