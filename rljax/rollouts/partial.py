"""Partial rollouts: answers that `sampling.enough` cut short go on in a later step, with the policy of that step.

What was drawn keeps the log-probs, temperatures and version of the policy that drew it; what follows gets the new
one's, and is drawn by the same key: with the same parameters the answer is the one that was never interrupted.
"""

import numpy as np

from rljax.types import Rows, Trajectory


def unfinished(traj: Trajectory) -> np.ndarray:
    """Which rows neither met a stop nor reached their limit. bool [B]"""
    return ~np.asarray(traj.terminated | traj.truncated).any(axis=1)


def resume(rows: Rows, traj: Trajectory, n: int, step: int) -> Rows:
    """The unfinished answers as rows that `sample` goes on with, padded on the left to the width of the trajectory.

    Args:
      rows, traj: what was sampled, n answers to each row (1 where `rows.requests` named them), and what came of it.
      step: the one they were drawn in. Raises ValueError where nothing is unfinished.
    """
    which = np.flatnonzero(unfinished(traj))
    if not len(which):
        raise ValueError("every answer is finished: there is nothing to resume")
    source, answer = (np.repeat(np.arange(len(rows.number)), n), np.tile(np.arange(n), len(rows.number)))
    if rows.requests is not None:
        source, answer = np.asarray(rows.requests).T
    names = ("inputs", "actions", "mask", "logp", "temperature")
    part = {name: np.asarray(getattr(traj, name))[which] for name in names}
    version = np.full_like(part["inputs"], step) if traj.version is None else np.asarray(traj.version)[which]
    shift = lambda x: np.concatenate([np.zeros_like(x[:, :1]), x], axis=1)  # noqa: E731
    inside = np.asarray(traj.segments)[which] > 0  # decisions; a token is there if it was seen or chosen
    there = shift(inside) | np.concatenate([inside, np.zeros_like(inside[:, :1])], axis=1)
    alone = ~there.any(axis=1)  # a prompt of one token with nothing drawn makes no decision
    there[alone, np.asarray(rows.tokens).shape[1] - 1] = True
    fields = {
        "tokens": np.concatenate([part["inputs"], part["actions"][:, -1:]], axis=1),
        "chosen": shift(part["mask"]),
        "logp": shift(part["logp"]),
        "temperature": shift(part["temperature"]),
        "version": shift(version),
        "mask": there,
    }
    order = np.argsort(there, axis=1, kind="stable")  # padding first
    fields = {name: np.take_along_axis(x, order, axis=1) for name, x in fields.items()}
    began = np.full(len(rows.number), step, np.int32) if rows.began is None else np.asarray(rows.began)
    return Rows(
        tokens=fields.pop("tokens"),
        mask=fields.pop("mask"),
        number=np.asarray(rows.number)[source[which]],
        columns=[rows.columns[i] for i in source[which]],
        cursor=rows.cursor,
        requests=np.stack([np.arange(len(which)), answer[which]], axis=1),
        past=fields,
        began=began[source[which]],
    )
