"""Demonstrations side by side in rows of one width: the same lesson as `demonstrations`, with less padding.

First fit, longest first: each demonstration goes to the first row that still has room for it, which takes at most
11/9 n + 6/9 rows where n would do (Dósa 2007). Segments keep them apart: no token sees another demonstration, positions
restart, and the first token of a segment is nobody's target. Sums over tokens and over sequences are those of unpacked
rows.

Left out: cutting a demonstration that is too long, and a fixed number of rows (each new number compiles once).
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from rljax.types import Trajectory, trajectory_of_tokens

Demonstration = tuple[Sequence[int], Sequence[int]]  # ids of the prompt, ids of the answer (EOS included)


def pack(rows: Sequence[Demonstration], width: int, pad: int = 0) -> Trajectory:
    """Demonstrations in rows of `width` tokens (width - 1 decisions), numbered 1, 2, ... in `segments` of each row.

    Rows hold several prompts, so `group` is None. A demonstration without a prompt loses its first token as a target.

    Raises ValueError for no demonstrations, and for one that is longer than `width` or has no tokens.
    """
    places = _first_fit([len(prompt) + len(answer) for prompt, answer in rows], width)
    tokens = np.full((len(places), width), pad, np.int32)
    segments = np.zeros((len(places), width), np.int32)
    chosen = np.zeros((len(places), width), bool)
    for row, members in enumerate(places):
        start = 0
        for number, index in enumerate(members, 1):
            prompt, answer = rows[index]
            middle, end = start + len(prompt), start + len(prompt) + len(answer)
            tokens[row, start:end] = [*prompt, *answer]
            segments[row, start:end] = number
            chosen[row, middle:end] = True
            start = end
    ones = jnp.ones(tokens.shape)
    return trajectory_of_tokens(tokens, segments, jnp.asarray(chosen), jnp.zeros(tokens.shape), temperature=ones)


def padding(rows: Sequence[Demonstration], width: int) -> tuple[float, float]:
    """Share of padding among the tokens computed: one demonstration a row, as wide as the longest; and packed."""
    lengths = [len(prompt) + len(answer) for prompt, answer in rows]
    packed = len(_first_fit(lengths, width)) * width
    return 1.0 - sum(lengths) / (len(lengths) * max(lengths)), 1.0 - sum(lengths) / packed


def _first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Which demonstrations stand in each row, longest first, equal ones in their own order."""
    if not lengths:
        raise ValueError("there are no demonstrations: at least one is needed")
    for index, length in enumerate(lengths):
        if not 0 < length <= width:
            raise ValueError(f"demonstration {index} has {length} tokens; a row holds from 1 to {width}")
    places, room = [], []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, left in enumerate(room) if left >= lengths[index]), len(room))
        if row == len(room):
            places.append([])
            room.append(width)
        places[row].append(index)
        room[row] -= lengths[index]
    return places
