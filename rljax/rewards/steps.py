"""The steps of a sampled completion: where each ends."""

from collections.abc import Sequence

import numpy as np

from rljax.types import Trajectory


def mark_step_ends(traj: Trajectory, token_bytes: Sequence[bytes], separator: str) -> np.ndarray:
    """[B T] bool: True on the decision that chose the last token of each step of the completion.

    A step ends with the token that completes the separator; white space alone is no step, and belongs to the next one.
    What follows the last separator is a step too, and ends at the last decision, which chose EOS or was cut.

    Args:
      token_bytes: of each id, empty for special tokens. Raises ValueError for an empty separator.
    """
    if not separator:
        raise ValueError("the separator of steps is empty; legal: a text, as a new line")
    actions = np.asarray(traj.actions)
    mask = np.asarray(traj.mask)
    ends = np.zeros(mask.shape, bool)
    for row, (chosen, kept) in enumerate(zip(actions, mask, strict=True)):
        columns = np.flatnonzero(kept)
        found = _ends_of([token_bytes[i] for i in chosen[columns]], separator.encode())
        ends[row, columns[found]] = True
    return ends


def _ends_of(pieces: list[bytes], separator: bytes) -> list[int]:
    """The indices of the pieces of a text in which its steps end."""
    ends = []
    tail = b""  # what the separator may lie in
    holds_text = False  # whether the present step does
    for index, piece in enumerate(pieces):
        tail = tail[max(0, len(tail) - len(separator) + 1) :] + piece
        holds_text = holds_text or bool(piece.strip())
        if piece and holds_text and separator in tail:
            ends.append(index)
            tail = b""
            holds_text = False
    if pieces and (holds_text or not ends):
        ends.append(len(pieces) - 1)
    return ends
