"""From completions to numbers: `score(traj, rows)` asks every verifier about every row and fills in its verdict.

A verifier is a function `verifier(completion, ...) -> number | None`. Its other parameters are named after the dataset
columns it wants. What it may answer, and what follows:

| answer | `scores[b, k]` | reward of the row |
|---|---|---|
| a finite number | that number | enters the sum, times its weight |
| None: "does not apply to this row" | NaN | left out of the sum; NaN if no verifier applies |
| no answer in time, or its process died | NaN | NaN: the row is not judged |
| raises, or returns anything else | | one RewardError ends the run: a fault of the verifier, not of the row |

A verifier of weight 0 is recorded only: it neither judges a row nor keeps it from being judged.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from rljax.rewards.function_path import name_of
from rljax.rewards.pool import Pool
from rljax.rewards.worker import Result, judge
from rljax.types import Rows, Trajectory


class RewardError(Exception):
    """A verifier is at fault, or asks for what the dataset does not hold."""


class Score(NamedTuple):
    """`score(traj, rows) -> traj` with `scores` and `rewards`; column k of `scores` is the verifier `names[k]`."""

    names: tuple[str, ...]
    call: Callable[[Trajectory, Rows], Trajectory]

    def __call__(self, traj: Trajectory, rows: Rows) -> Trajectory:
        return self.call(traj, rows)


def make_score(
    verifiers: dict[str, Callable],
    decode: Callable[[list[int]], str],
    weights: dict[str, float] | None = None,
    pool: Pool | None = None,
) -> Score:
    """The function that judges a rollout.

    Args:
      verifiers: name (for logs and weights) -> function. decode: chosen token ids, EOS among them -> text, without
      special tokens. weights: name -> factor in the reward; 1 where not given. pool: None calls the verifiers in this
      process, where nothing stops one that hangs; the numbers are the same.

    Returns: `Score`. It reads `group` (row b answers the prompt of number `group[b]`), `actions` and `mask`, and fills
    `scores` [B K] float32 and `rewards` [B T] float32: the weighted sum on the last chosen token as the mask tells, 0
    elsewhere. A row that chose nothing gets scores and no reward.
    Raises RewardError naming the verifier, the prompt and the completion; ValueError for weights it does not know.
    """
    if not verifiers:
        raise ValueError("make_score needs at least one verifier")
    weights = weights or {}
    wrong = {name: weight for name, weight in weights.items() if name not in verifiers or not math.isfinite(weight)}
    if wrong:
        raise ValueError(f"weights {wrong} are not legal; legal are finite weights of {', '.join(verifiers)}")
    factors = np.array([weights.get(name, 1.0) for name in verifiers])
    wants = {name: _wanted(verifier) for name, verifier in verifiers.items()}

    def call(traj: Trajectory, rows: Rows) -> Trajectory:
        mask, actions = np.asarray(traj.mask), np.asarray(traj.actions)
        prompts = _prompts(traj, rows)
        completions = [decode(chosen[kept].tolist()) for chosen, kept in zip(actions, mask, strict=True)]
        results = []
        for name, verifier in verifiers.items():
            items = [
                ((completion,), _arguments(verifier, wants[name], rows, prompt))
                for completion, prompt in zip(completions, prompts, strict=True)
            ]
            answers = pool.map(verifier, items) if pool else [judge(verifier, *item) for item in items]
            _raise_first(verifier, answers, completions, rows.number[prompts])
            results.append(answers)
        values, failed = _table(results)
        return traj.replace(scores=values.astype(np.float32), rewards=_rewards(values, failed, factors, mask))

    return Score(tuple(verifiers), call)


# ------------------------------------------------------------------------------------------------- what a verifier asks


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class _Wanted(NamedTuple):
    """What a verifier's signature says of the dataset's columns."""

    needed: set[str]  # named, without a default
    named: set[str]
    others: bool  # **kwargs: all columns
    taken: set[str]  # the completion's own name, and what a partial has bound


def _wanted(verifier: Callable) -> _Wanted:
    parameters = list(inspect.signature(verifier).parameters.values())
    if not parameters or parameters[0].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
        raise ValueError(f"{name_of(verifier)}: a verifier takes the completion as its first argument")
    bound = verifier.keywords if isinstance(verifier, partial) else {}
    named = [p for p in parameters[1:] if p.name not in bound and p.kind in _BY_NAME]
    return _Wanted(
        needed={p.name for p in named if p.default is p.empty},
        named={p.name for p in named},
        others=any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters),
        taken={parameters[0].name, *bound},
    )


def _arguments(verifier: Callable, wanted: _Wanted, rows: Rows, prompt: int) -> dict:
    columns = rows.columns[prompt]
    missing = sorted(wanted.needed - columns.keys())
    if missing:
        raise RewardError(
            f"{name_of(verifier)} asks for {', '.join(missing)}, which prompt {rows.number[prompt]} does not have; "
            f"its columns are {', '.join(columns) or 'none'}"
        )
    return {
        name: value
        for name, value in columns.items()
        if name in wanted.named or (wanted.others and name not in wanted.taken)
    }


def _prompts(traj: Trajectory, rows: Rows) -> np.ndarray:
    """[B] where in `rows` the prompt of each row stands: its number is the row's group."""
    place = {int(number): i for i, number in enumerate(rows.number)}
    group = [] if traj.group is None else np.asarray(traj.group).tolist()
    if traj.group is None or not set(group) <= place.keys():
        raise ValueError(f"score needs traj.group: the number of each row's prompt, one of {sorted(place)[:8]} ...")
    return np.array([place[number] for number in group], np.int64)


# --------------------------------------------------------------------------------------------------- what becomes of it


def _raise_first(verifier: Callable, answers: list[Result], completions: list[str], numbers: np.ndarray) -> None:
    for answer, completion, number in zip(answers, completions, numbers, strict=True):
        if answer.status == "error":
            shown = completion if len(completion) <= 200 else f"{completion[:100]} ... {completion[-100:]}"
            raise RewardError(
                f"{name_of(verifier)} failed on prompt {number}, completion {shown!r}: {answer.detail}\n"
                "Legal: a finite number, or None where the verifier does not apply"
            )


def _table(results: list[list[Result]]) -> tuple[np.ndarray, np.ndarray]:
    """[B K] values, NaN where there is none; [B K] True where judging failed."""
    values = [[math.nan if answer.value is None else answer.value for answer in answers] for answers in results]
    failed = [[answer.status in ("timeout", "died") for answer in answers] for answers in results]
    return np.array(values, np.float64).T, np.array(failed, bool).T


def _rewards(values: np.ndarray, failed: np.ndarray, factors: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[B T] the weighted sum on the last chosen token, NaN there if the row is not judged, 0 elsewhere."""
    judged = np.isfinite(values) & (factors != 0)
    total = np.where(judged, values * factors, 0.0).sum(1)
    total[~judged.any(1) | (failed & (factors != 0)).any(1)] = np.nan
    rewards = np.zeros(mask.shape, np.float32)
    chose = np.flatnonzero(mask.any(1))
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
    rewards[chose, last[chose]] = total[chose]
    return rewards
