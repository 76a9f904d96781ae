"""Partial rollouts: completions that `sampling.stop_after` interrupted go on in a later step, with its policy.

What was sampled keeps the log-probs, temperatures and version of the policy that sampled it; what follows gets the new
one's, and is sampled with the same key: with the same parameters the completion is the one that was never interrupted.

`partial_step` is a step with P groups in progress of which all but a fixed number are trained on (APRIL,
arXiv:2509.18521, with whole groups): no step waits for its longest completions, and none is lost.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rljax.types import PromptBatch, Resume, Trajectory

CHOSEN_FACTS = ("logp", "temperature", "version", "terminated", "truncated")  # of a token that was sampled
RESUME_FACTS = ("chosen", *CHOSEN_FACTS)  # keys of `Resume.facts`, and "support" where the sampler keeps it
NO_TOKEN = {"support": -1}  # what padding holds; 0 in the others
ROW_ARRAYS = ("tokens", "mask", "number")  # arrays of `PromptBatch`


def partial_step(
    rollout: Callable[[PromptBatch], Trajectory],
    new_prompts: PromptBatch,
    carried: PromptBatch | None,
    n: int,
    carry_over: int,
    step: int,
    width: int,
) -> tuple[Trajectory, PromptBatch, PromptBatch]:
    """One step: a trajectory of finished groups, the rows they were sampled from, and the groups to carry over.

    Args:
      rollout: rows -> trajectory, with a sampling whose `stop_after` leaves at most `carry_over` completions out.
      new_prompts, carried: fresh prompts, and what the last step carried over; None in the first step.
      n: completions a prompt. carry_over: groups left for the next step.
      width: columns of prompt and completion together.
    """
    rows = new_prompts if carried is None else join_rows(carried, new_prompts, n, step)
    traj = fit_columns(rollout(rows), width - 1)
    num_finished = len(traj.mask) // n - carry_over
    finished, others = split_finished_groups(traj, num_finished)
    carried = resume_rows(rows, traj, n, step, others, width)
    return jax.tree.map(lambda x: x[finished], traj), rows, carried


# ------------------------------------------------------------------------------------------------------- checkpoints


def carry_to_arrays(carried: PromptBatch) -> dict[str, np.ndarray]:
    """Carried rows as arrays of fixed shapes, under the names that checkpoints have."""
    arrays = {name: getattr(carried, name) for name in ROW_ARRAYS}
    arrays["began"] = carried.resume.start_step
    arrays["answer"] = carried.resume.requests[:, 1]
    return arrays | carried.resume.facts


def empty_carry(carry_over: int, n: int, width: int, support: int | None = None) -> dict[str, np.ndarray]:
    """`carry_to_arrays` before the first step: arrays of its shapes, with prompt numbers of -1.

    support: `Sampling.support`.
    """
    B = carry_over * n
    dtypes = {"logp": np.float32, "temperature": np.float32, "tokens": np.int32, "version": np.int32}
    arrays = {name: np.zeros((B, width), dtypes.get(name, bool)) for name in ("tokens", "mask", *RESUME_FACTS)}
    if support is not None:
        arrays["support"] = np.full((B, width, support), -1, np.int32)
    for name in ("number", "began", "answer"):
        arrays[name] = np.full(B, -1, np.int32)
    return arrays


def carry_from_arrays(
    arrays: dict,
    columns: Callable[[np.ndarray], list[dict]],
    shaped: Callable[[np.ndarray], list[dict]] | None = None,
) -> PromptBatch | None:
    """The rows of `carry_to_arrays`; None of `empty_carry`.

    Args: columns, shaped: numbers of prompts -> these fields of a PromptBatch.
    """
    arrays = {name: np.asarray(x) for name, x in arrays.items()}
    if (arrays["number"] < 0).any():
        return None
    row = np.arange(len(arrays["number"]), dtype=np.int32)
    resume = Resume(
        requests=np.stack([row, arrays["answer"]], axis=1),
        facts={name: arrays[name] for name in (*RESUME_FACTS, "support") if name in arrays},
        start_step=arrays["began"],
    )
    row_arrays = {name: arrays[name] for name in ROW_ARRAYS}
    found = columns(arrays["number"])
    rows = None if shaped is None else shaped(arrays["number"])
    return PromptBatch(**row_arrays, columns=found, cursor=0, resume=resume, shaped=rows)


# ------------------------------------------------------------------------------------------------------ which rows


def unfinished_rows(traj: Trajectory) -> np.ndarray:
    """Which rows neither met a stop nor reached max_tokens. bool [B]"""
    return ~np.asarray(traj.terminated | traj.truncated).any(axis=1)


def split_finished_groups(traj: Trajectory, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `count` finished groups, the earliest prompts first, and the rows of all others. Groups stay together.

    Raises ValueError where fewer are finished: `stop_after` interrupted completions of too many groups.
    """
    group = np.asarray(traj.group)
    unfinished = set(group[unfinished_rows(traj)].tolist())
    finished = [number for number in np.unique(group).tolist() if number not in unfinished][:count]
    if len(finished) < count:
        raise ValueError(f"{len(finished)} groups are finished, {count} are needed; stop_after is too small")
    order = np.argsort(group, kind="stable")
    is_finished = np.isin(group[order], finished)
    return order[is_finished], order[~is_finished]


# ------------------------------------------------------------------------------------------------------ rows to resume


def resume_rows(
    rows: PromptBatch, traj: Trajectory, n: int, step: int, which: np.ndarray | None = None, width: int | None = None
) -> PromptBatch:
    """Completions as rows that `sample` goes on with, or leaves as they are if they are finished.

    Args:
      rows, traj: what was sampled, n completions of each row (or those of `rows.resume`), and the result.
      step: the one they were sampled in.
      which: rows of traj; the unfinished ones by default. Raises ValueError where there are none.
      width: columns of the result, which the rows end in; by default as many as the trajectory's tokens.
    """
    which = np.flatnonzero(unfinished_rows(traj)) if which is None else np.asarray(which)
    if not len(which):
        raise ValueError("every completion is finished: there is nothing to resume")
    source, index = _source_and_index(rows, n)
    start_step = np.full(len(rows.number), step, np.int32)
    if rows.resume is not None and rows.resume.start_step is not None:
        start_step = np.asarray(rows.resume.start_step)

    facts = _token_facts(traj, which, step, prompt_width=np.asarray(rows.tokens).shape[1])
    facts = _align_right(facts, width)
    requests = np.stack([np.arange(len(which)), index[which]], axis=1).astype(np.int32)
    source = source[which]
    return PromptBatch(
        tokens=facts.pop("tokens"),
        mask=facts.pop("mask"),
        number=np.asarray(rows.number)[source],
        columns=[rows.columns[i] for i in source],
        cursor=rows.cursor,
        resume=Resume(requests, facts, start_step[source]),
        shaped=None if rows.shaped is None else [rows.shaped[i] for i in source],
    )


def _source_and_index(rows: PromptBatch, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each completion, the row of its prompt and which of the prompt's completions it is."""
    if rows.resume is not None:
        requests = np.asarray(rows.resume.requests)
        return requests[:, 0], requests[:, 1]
    P = len(rows.number)
    return np.repeat(np.arange(P), n), np.tile(np.arange(n), P)


def _token_facts(traj: Trajectory, which: np.ndarray, step: int, prompt_width: int) -> dict[str, np.ndarray]:
    """Facts of tokens [B S] out of those of decisions [B T], S = T + 1: tokens, mask and RESUME_FACTS."""

    def shift(x, fill=0):  # the decision at t chose token t + 1
        return np.concatenate([np.full_like(x[:, :1], fill), x], axis=1)

    def of(name):
        return np.asarray(getattr(traj, name))[which]

    actions = of("actions")
    facts = {
        "tokens": np.concatenate([of("inputs")[:, :1], actions], axis=1),
        "mask": _real_tokens(of("segments") > 0, prompt_width - 1),
        "chosen": shift(of("mask")),
        "version": shift(np.full_like(actions, step) if traj.version is None else of("version")),
    }
    for name in ("logp", "temperature", "terminated", "truncated"):
        facts[name] = shift(of(name))
    if traj.support is not None:
        facts["support"] = shift(of("support"), NO_TOKEN["support"])
    return facts


def _real_tokens(inside: np.ndarray, last: int) -> np.ndarray:
    """[B S] which tokens are real, of decisions [B T]: those seen and the one chosen last.

    A prompt of one token with nothing sampled makes no decision; its token is in column `last`.
    """
    no_column = np.zeros_like(inside[:, :1])
    seen = np.concatenate([inside, no_column], axis=1)
    chosen = np.concatenate([no_column, inside], axis=1)
    real = seen | chosen
    real[~real.any(axis=1), last] = True
    return real


def _align_right(facts: dict[str, np.ndarray], width: int | None) -> dict[str, np.ndarray]:
    """The rows moved to the last of `width` columns, padding first. Raises ValueError where a row is longer."""
    real = facts["mask"]
    longest = real.sum(axis=1).max()
    if width is not None and longest > width:
        raise ValueError(f"width is {width}; legal: at least {longest}, the longest row")
    order = np.argsort(real, axis=1, kind="stable")
    row = np.arange(len(real))[:, None]
    return {
        name: _pad_or_cut_left(x[row, order], width or x.shape[1], NO_TOKEN.get(name, 0)) for name, x in facts.items()
    }


def _pad_or_cut_left(x: np.ndarray, width: int, fill: int = 0) -> np.ndarray:
    """x [B S ...] with its last columns in the last of `width`."""
    cut = x[:, max(x.shape[1] - width, 0) :]
    padding = ((0, 0), (width - cut.shape[1], 0)) + ((0, 0),) * (x.ndim - 2)
    return np.pad(cut, padding, constant_values=fill)


def join_rows(carried: PromptBatch, new_prompts: PromptBatch, n: int, step: int) -> PromptBatch:
    """Carried completions, one a row, then n completions of each new prompt; in rows of the carried ones' width."""
    width = carried.tokens.shape[1]
    P = len(new_prompts.number)

    def stack(a, b, fill=0):
        return np.concatenate([np.asarray(a), _pad_or_cut_left(np.asarray(b), width, fill)])

    def no_fact(name):
        fact = np.asarray(old.facts[name])
        return np.full((*new_prompts.tokens.shape, *fact.shape[2:]), NO_TOKEN.get(name, 0), fact.dtype)

    source, index = _source_and_index(new_prompts, n)
    new_requests = np.stack([source + len(carried.number), index], axis=1)
    old = carried.resume
    resume = Resume(
        requests=np.concatenate([old.requests, new_requests]).astype(np.int32),
        facts={name: stack(old.facts[name], no_fact(name), NO_TOKEN.get(name, 0)) for name in old.facts},
        start_step=np.concatenate([old.start_step, np.full(P, step, np.int32)]),
    )
    return PromptBatch(
        tokens=stack(carried.tokens, new_prompts.tokens),
        mask=stack(carried.mask, new_prompts.mask),
        number=np.concatenate([carried.number, new_prompts.number]),
        columns=[*carried.columns, *new_prompts.columns],
        cursor=new_prompts.cursor,
        resume=resume,
        shaped=None if new_prompts.shaped is None else [*carried.as_read, *new_prompts.shaped],
    )


def fit_columns(traj: Trajectory, decisions: int) -> Trajectory:
    """A sampled trajectory with its rows from the first column on, in fewer columns: padding on their left is cut.

    Raises ValueError where a row has more decisions.
    """
    real = traj.segments > 0
    B, T = real.shape
    first = jnp.argmax(real, axis=1)
    from_the_right = jnp.argmax(real[:, ::-1], axis=1)
    longest = jnp.where(real.any(axis=1), T - from_the_right - first, 0).max()
    if longest > decisions:
        raise ValueError(f"{decisions} decisions a row; legal: at least {longest}, those of the longest")
    columns = (first[:, None] + jnp.arange(decisions)[None]) % T  # what is cut on the left goes to the right
    rows = jnp.arange(B)[:, None]
    return jax.tree.map(lambda x: x[rows, columns] if x.shape[:2] == real.shape else x, traj)
