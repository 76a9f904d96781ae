"""Partial rollouts: answers that `sampling.stop_after` cut short go on in a later step, with the policy of that step.

What was drawn keeps the log-probs, temperatures and version of the policy that drew it; what follows gets the new
one's, and is drawn by the same key: with the same parameters the answer is the one that was never interrupted.

`turn` is a step with P groups in play of which all but a fixed number are learnt from (APRIL, arXiv:2509.18521, with
whole groups): no step waits for its longest answers, and none is lost.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rljax.rollouts.answers import PAST
from rljax.types import Rows, Trajectory

OF_CHOSEN = ("logp", "temperature", "version", "terminated", "truncated")  # facts of a chosen token


def turn(
    draw: Callable[[Rows], Trajectory], fresh: Rows, carried: Rows | None, n: int, wait: int, step: int, width: int
) -> tuple[Trajectory, Rows, Rows]:
    """A trajectory of finished groups; the rows they were drawn from; `wait` other groups, for the next turn.

    Args:
      draw: rows -> trajectory, with a sampling whose `stop_after` leaves `wait` answers out at most.
      fresh, carried: new prompts, and what the last turn left: None in the first. n: answers a prompt.
      width: columns of prompt and answer together.
    """
    rows = fresh if carried is None else join(carried, fresh, n, step)
    traj = fit(draw(rows), width - 1)
    leaves, stays = divide(traj, len(traj.mask) // n - wait)
    return jax.tree.map(lambda x: x[leaves], traj), rows, resume(rows, traj, n, step, stays, width)


def store(carried: Rows) -> dict[str, np.ndarray]:
    """What a checkpoint keeps of carried rows: arrays of fixed shapes."""
    _, answer = carried.requests.T
    fields = {name: getattr(carried, name) for name in ("tokens", "mask", "number", "began")}
    return fields | {"answer": answer} | carried.past


def blank(wait: int, n: int, width: int) -> dict[str, np.ndarray]:
    """`store` before the first turn."""
    of_rows, shape = np.full(wait * n, -1, np.int32), (wait * n, width)
    kinds = {"logp": np.float32, "temperature": np.float32, "tokens": np.int32, "version": np.int32}
    return {name: np.zeros(shape, kinds.get(name, bool)) for name in ("tokens", "mask", *PAST)} | {
        name: of_rows for name in ("number", "began", "answer")
    }


def restore(stored: dict, columns: Callable[[np.ndarray], list[dict]]) -> Rows | None:
    """The rows that `store` took apart, None of `blank`. columns: numbers of prompts -> their columns."""
    stored = {name: np.asarray(x) for name, x in stored.items()}
    if (stored["number"] < 0).any():
        return None
    requests = np.stack([np.arange(len(stored["number"]), dtype=np.int32), stored["answer"]], axis=1)
    return Rows(
        **{name: stored[name] for name in ("tokens", "mask", "number", "began")},
        columns=columns(stored["number"]),
        cursor=0,
        requests=requests,
        past={name: stored[name] for name in PAST},
    )


def unfinished(traj: Trajectory) -> np.ndarray:
    """Which rows neither met a stop nor reached their limit. bool [B]"""
    return ~np.asarray(traj.terminated | traj.truncated).any(axis=1)


def divide(traj: Trajectory, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `count` finished groups, the earliest prompts first, and those of all others. Groups stay together.

    Raises ValueError where fewer are finished: `stop_after` must leave at most as many answers as groups may wait.
    """
    group = np.asarray(traj.group)
    late = set(group[unfinished(traj)].tolist())
    ready = [number for number in np.unique(group).tolist() if number not in late][:count]
    if len(ready) < count:
        raise ValueError(f"{len(ready)} groups are finished, {count} are to leave; enough lets too many wait")
    order = np.argsort(group, kind="stable")
    leaves = np.isin(group[order], ready)
    return order[leaves], order[~leaves]


def resume(
    rows: Rows, traj: Trajectory, n: int, step: int, which: np.ndarray | None = None, width: int | None = None
) -> Rows:
    """Answers as rows that `sample` goes on with, or leaves as they are if they are finished.

    Args:
      rows, traj: what was sampled, n answers to each row (1 where `rows.requests` named them), and what came of it.
      step: the one they were drawn in.
      which: rows of traj; the unfinished ones by default. Raises ValueError where there are none.
      width: columns of the result, in which the rows end; as many as fit whatever comes by default.
    """
    which = np.flatnonzero(unfinished(traj)) if which is None else np.asarray(which)
    if not len(which):
        raise ValueError("every answer is finished: there is nothing to resume")
    source, answer = (np.repeat(np.arange(len(rows.number)), n), np.tile(np.arange(n), len(rows.number)))
    if rows.requests is not None:
        source, answer = np.asarray(rows.requests).T
    names = ("inputs", "actions", "mask", "logp", "temperature", "terminated", "truncated")
    part = {name: np.asarray(getattr(traj, name))[which] for name in names}
    part["version"] = np.full_like(part["inputs"], step) if traj.version is None else np.asarray(traj.version)[which]
    shift = lambda x: np.concatenate([np.zeros_like(x[:, :1]), x], axis=1)  # noqa: E731
    there = _tokens_there(np.asarray(traj.segments)[which] > 0, np.asarray(rows.tokens).shape[1] - 1)
    fields = {name: shift(part[name]) for name in OF_CHOSEN} | {
        "tokens": np.concatenate([part["inputs"][:, :1], part["actions"]], axis=1),
        "chosen": shift(part["mask"]),
        "mask": there,
    }
    order = np.argsort(there, axis=1, kind="stable")  # padding first
    fields = {name: _widen(np.take_along_axis(x, order, axis=1), width or x.shape[1]) for name, x in fields.items()}
    if (fields["mask"].sum(axis=1) < there.sum(axis=1)).any():
        raise ValueError(f"width is {width}; legal: at least {there.sum(axis=1).max()}, the longest row")
    began = np.full(len(rows.number), step, np.int32) if rows.began is None else np.asarray(rows.began)
    return Rows(
        tokens=fields.pop("tokens"),
        mask=fields.pop("mask"),
        number=np.asarray(rows.number)[source[which]],
        columns=[rows.columns[i] for i in source[which]],
        cursor=rows.cursor,
        requests=np.stack([np.arange(len(which)), answer[which]], axis=1).astype(np.int32),
        past=fields,
        began=began[source[which]],
    )


def join(carried: Rows, fresh: Rows, n: int, step: int) -> Rows:
    """Carried answers, one a row, then n answers to each fresh prompt; in rows of the carried ones' width."""
    width, count = carried.tokens.shape[1], len(carried.number)
    none = {name: np.zeros_like(carried.past[name], shape=fresh.tokens.shape) for name in PAST}
    stack = lambda a, b: np.concatenate([np.asarray(a), _widen(np.asarray(b), width)])  # noqa: E731
    new = np.add(np.stack(np.divmod(np.arange(len(fresh.number) * n), n), axis=1), [count, 0])
    return Rows(
        tokens=stack(carried.tokens, fresh.tokens),
        mask=stack(carried.mask, fresh.mask),
        number=np.concatenate([carried.number, fresh.number]),
        columns=[*carried.columns, *fresh.columns],
        cursor=fresh.cursor,
        requests=np.concatenate([carried.requests, new]).astype(np.int32),
        past={name: stack(carried.past[name], none[name]) for name in PAST},
        began=np.concatenate([carried.began, np.full(len(fresh.number), step, np.int32)]),
    )


def fit(traj: Trajectory, decisions: int) -> Trajectory:
    """A sampled trajectory with its rows from the first column on, in fewer columns: padding on their left is cut.

    Raises ValueError where a row has more decisions.
    """
    there, T = traj.segments > 0, traj.segments.shape[1]
    first = jnp.argmax(there, axis=1)
    end = jnp.where(there.any(axis=1), T - jnp.argmax(there[:, ::-1], axis=1) - first, 0).max()
    if end > decisions:
        raise ValueError(f"{decisions} decisions a row; legal: at least {end}, those of the longest")
    columns = (first[:, None] + jnp.arange(decisions)[None]) % T  # what is cut on the left goes to the right
    rows = jnp.arange(len(first))[:, None]
    return jax.tree.map(lambda x: x[rows, columns] if x.shape[:2] == there.shape else x, traj)


def _tokens_there(inside: np.ndarray, last: int) -> np.ndarray:
    """[B S] which tokens are real, of decisions [B T]: those seen and the one chosen last.

    A prompt of one token with nothing drawn makes no decision; its token stands in column `last`.
    """
    seen, blank = inside, np.zeros_like(inside[:, :1])
    there = np.concatenate([blank, seen], axis=1) | np.concatenate([seen, blank], axis=1)
    there[~there.any(axis=1), last] = True
    return there


def _widen(x: np.ndarray, width: int) -> np.ndarray:
    """x [B S] with its last columns in the last of `width`."""
    cut = x[:, max(x.shape[1] - width, 0) :]
    return np.pad(cut, ((0, 0), (width - cut.shape[1], 0)))
