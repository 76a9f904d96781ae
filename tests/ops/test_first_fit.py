"""First fit decreasing against a search of every row in turn."""

import numpy as np
import pytest

from rljax.ops.first_fit import first_fit_decreasing


def searched(lengths, width, max_rows):
    room = np.full(max_rows, width)
    rows = np.zeros(len(lengths), int)
    for index in np.argsort(-np.asarray(lengths, int), kind="stable"):
        (fitting,) = np.nonzero(room >= lengths[index])
        if not len(fitting):
            return None
        rows[index] = fitting[0]
        room[fitting[0]] -= lengths[index]
    return rows.tolist()


@pytest.mark.parametrize("seed", range(200))
def test_each_goes_to_the_first_row_with_room(seed):
    draw = np.random.default_rng(seed)
    width = int(draw.integers(1, 20))
    lengths = draw.integers(1, width + 1, draw.integers(0, 30)).tolist()
    max_rows = int(draw.integers(1, 20))
    assert first_fit_decreasing(lengths, width, max_rows) == searched(lengths, width, max_rows)


def test_what_is_too_long_or_too_much_has_no_rows():
    assert first_fit_decreasing([3], 2, 5) is None
    assert first_fit_decreasing([2, 2], 2, 1) is None
    assert first_fit_decreasing([], 2, 1) == []
