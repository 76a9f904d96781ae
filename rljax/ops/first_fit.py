"""Bin packing by first fit decreasing, on the host."""

from collections.abc import Sequence


def first_fit_decreasing(lengths: Sequence[int], width: int, max_rows: int) -> list[int] | None:
    """The row of each sequence, so that no row holds more than `width` tokens; None where `max_rows` do not suffice.

    The longest first, equal ones in their own order, each goes to the first row with room for it. That takes at most
    11/9 n + 6/9 rows where n would do (Dósa 2007).

    >>> first_fit_decreasing([2, 5, 3], width=5, max_rows=3)
    [1, 0, 1]
    """
    if sum(lengths) > max_rows * width:
        return None
    # A binary tree of the room that is left: row r is the leaf leaves + r, a node holds the maximum of its children.
    leaves = 1 << (max(max_rows, 1) - 1).bit_length()
    room = [0] * leaves + [width] * max_rows + [0] * (leaves - max_rows)
    for node in range(leaves - 1, 0, -1):
        room[node] = max(room[2 * node], room[2 * node + 1])
    rows = [0] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if room[1] < lengths[index]:
            return None
        node = 1
        while node < leaves:  # to the leftmost leaf with enough room
            node = 2 * node if room[2 * node] >= lengths[index] else 2 * node + 1
        rows[index] = node - leaves
        room[node] -= lengths[index]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows
