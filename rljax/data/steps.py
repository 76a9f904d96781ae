"""Solutions whose steps are labeled, as batches of process reward models."""

from collections.abc import Sequence

import numpy as np

from rljax.data.demonstrations import collate
from rljax.data.examples import Steps
from rljax.types import Trajectory


def collate_steps(solutions: Sequence[Steps], width: int, pad: int = 0) -> Trajectory:
    """Solutions, each in a row of `width` tokens: `step_ends` marks the last token of each step, `rewards` holds its
    label there. NaN is no label. Raises ValueError for one that is longer.
    """
    traj = collate([solution.example for solution in solutions], width, pad)
    step_ends = np.zeros((len(solutions), width), bool)
    labels = np.zeros((len(solutions), width), np.float32)
    for row, solution in enumerate(solutions):
        start = len(solution.example.prompt)
        columns = slice(start, start + len(solution.labels))
        step_ends[row, columns] = solution.step_ends
        labels[row, columns] = np.where(solution.step_ends, solution.labels, 0.0)
    return traj.replace(step_ends=step_ends[:, 1:], rewards=labels[:, 1:])  # a decision is at the column before
