"""Scores and rewards of completions: `score(traj, prompts)` calls every verifier on every completion.

A verifier is a function `verifier(completion, ...) -> number | None`. Its other parameters are named after the dataset
columns that it wants. What it may return, and what follows:

| result | `scores[b, k]` | reward of the row |
|---|---|---|
| a finite number | that number | enters the sum, times its weight |
| None: it does not apply to this row | NaN | left out of the sum; NaN if no verifier applies |
| no result in time, or its process died | NaN | NaN: the row has no reward, and its group's mean leaves it out |
| raises, or returns anything else | | a RewardError ends the run: a bug in the verifier, not a property of the row |

A model reward judges all completions at once: `model_reward(traj, prompts)` returns a number or a `Result` a row. NaN
is "could not be judged", as when no result came in time.

A verifier or model reward with weight 0 is recorded only: it neither gives a row a reward nor takes it away.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from rljax.rewards.function_path import function_name
from rljax.rewards.pool import Pool
from rljax.rewards.worker import FAILED, MAX_FLOAT32, Result, call_verifier
from rljax.types import Array, PromptBatch, RewardFn, Trajectory

# A reward model or a server: (trajectory, prompts) -> a number or a Result for each row.
ModelReward = Callable[[Trajectory, PromptBatch], Array | Sequence[Result]]


class RewardError(Exception):
    """A verifier has a bug, or asks for a column that the dataset does not have."""


class Score(NamedTuple):
    """`score(traj, prompts) -> traj` with `scores` and `rewards`; column k of `scores` is the reward `names[k]`."""

    names: tuple[str, ...]
    call: Callable[[Trajectory, PromptBatch], Trajectory]

    def __call__(self, traj: Trajectory, prompts: PromptBatch) -> Trajectory:
        return self.call(traj, prompts)


def make_score(
    verifiers: Mapping[str, RewardFn],
    decode: Callable[[list[int]], str],
    weights: Mapping[str, float] | None = None,
    pool: Pool | None = None,
    model_rewards: Mapping[str, ModelReward] | None = None,
) -> Score:
    """The function that scores a rollout.

    Args:
      verifiers: by name, as in the logs and in `weights`.
      decode: chosen token ids, EOS included -> text without special tokens.
      weights: name -> factor in the reward; 1 where not given.
      pool: None calls the verifiers in this process, where nothing stops one that hangs; the numbers are the same.
      model_rewards: by name, which no verifier has; their columns follow those of the verifiers.

    Returns: `Score`. It reads `group` (row b completes the prompt with number `group[b]`), `actions` and `mask`, and
    fills `scores` and `reward_weights` [B K] float32 and `rewards` [B T] float32: the weighted sum on the last chosen
    token according to the mask, 0 elsewhere. A row without a chosen token gets scores, and rewards of 0.
    Raises RewardError naming the verifier, the prompt and the completion; ValueError for unknown weights.
    """
    model_rewards = model_rewards or {}
    names = (*verifiers, *model_rewards)
    factors = _factors(names, weights or {})
    signatures = {name: _read_signature(verifier) for name, verifier in verifiers.items()}

    def call(traj: Trajectory, prompts: PromptBatch) -> Trajectory:
        mask = np.asarray(traj.mask)
        indices = prompt_indices(traj, prompts)
        completions = _decode_completions(np.asarray(traj.actions), mask, decode)
        results = []
        for name, verifier in verifiers.items():
            arguments = [_arguments(verifier, signatures[name], prompts, prompt) for prompt in indices]
            calls = [((completion,), kwargs) for completion, kwargs in zip(completions, arguments, strict=True)]
            if pool is None:
                returned = [call_verifier(verifier, args, kwargs) for args, kwargs in calls]
            else:
                returned = pool.map(verifier, calls)
            _raise_first_error(verifier, returned, completions, prompts.number[indices])
            results.append(returned)
        for name, model_reward in model_rewards.items():
            results.append(_judge_by_model(name, model_reward, traj, prompts))
        values, failed = _as_arrays(results)
        return traj.replace(
            scores=values.astype(np.float32),
            reward_weights=np.broadcast_to(factors.astype(np.float32), values.shape),
            rewards=_rewards(values, failed, factors, mask),
        )

    return Score(names, call)


def _factors(names: tuple[str, ...], weights: Mapping[str, float]) -> np.ndarray:
    """[K] the weight of each reward. Raises ValueError for names that are none or twice there, and unknown weights."""
    if not names:
        raise ValueError("make_score needs at least one verifier or model reward")
    if len(set(names)) < len(names):
        raise ValueError(f"a verifier and a model reward have one name; legal: names that differ, here {names}")
    wrong = {name: weight for name, weight in weights.items() if name not in names or not math.isfinite(weight)}
    if wrong:
        raise ValueError(f"weights {wrong} are not legal; legal are finite weights of {', '.join(names)}")
    return np.array([weights.get(name, 1.0) for name in names])


def _judge_by_model(name: str, model_reward: ModelReward, traj: Trajectory, prompts: PromptBatch) -> list[Result]:
    """A Result for each row. Raises RewardError unless there is a number, NaN or a Result for each."""
    returned = model_reward(traj, prompts)
    if isinstance(returned, list) and all(isinstance(result, Result) for result in returned):
        results = returned
    else:
        results = [_result_of_number(float(value)) for value in np.asarray(returned, np.float64).ravel()]
    wrong = [result.detail for result in results if result.status == "error"]
    if len(results) != len(traj.mask):
        wrong = [f"it returned {len(results)} numbers for {len(traj.mask)} rows"]
    if wrong:
        raise RewardError(f"the model reward {name} failed: {wrong[0]}\nLegal: a finite number, or NaN, for each row")
    return results


def _result_of_number(value: float) -> Result:
    if math.isnan(value):
        return Result(None, "invalid", "its score is NaN")
    if abs(value) > MAX_FLOAT32:
        return Result(None, "error", f"it returned {value}")
    return Result(value, "ok")


class RowText(NamedTuple):
    """A row as text, without special tokens."""

    prompt: str  # what was read before the first decision
    completion: str  # what was chosen
    ended: bool  # by a stop token; False where it was cut, or where that is not known


def decode_rows(traj: Trajectory, decode: Callable[[list[int]], str]) -> list[RowText]:
    """Prompt and completion of each row. decode: token ids -> text without special tokens."""
    inputs = np.asarray(traj.inputs)
    mask = np.asarray(traj.mask)
    present = np.ones(mask.shape, bool) if traj.segments is None else np.asarray(traj.segments) > 0
    before = np.cumsum(mask, axis=1) - mask == 0  # up to and with the input of the first decision
    ended = np.zeros(len(mask), bool)
    if traj.terminated is not None:
        ended = (np.asarray(traj.terminated) & mask).any(axis=1)
    completions = _decode_completions(np.asarray(traj.actions), mask, decode)
    prompts = [decode(inputs[b][before[b] & present[b]].tolist()) for b in range(len(mask))]
    return [RowText(*row) for row in zip(prompts, completions, ended.tolist(), strict=True)]


def _decode_completions(actions: np.ndarray, mask: np.ndarray, decode: Callable[[list[int]], str]) -> list[str]:
    return [decode(chosen[kept].tolist()) for chosen, kept in zip(actions, mask, strict=True)]


# ---------------------------------------------------------------------------------------- the arguments of a verifier


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class _Signature(NamedTuple):
    """The dataset columns that a verifier takes."""

    required: set[str]  # named, without a default
    named: set[str]
    takes_all: bool  # **kwargs: all columns
    taken: set[str]  # the name of the completion's parameter, and what a partial has bound


def _read_signature(verifier: RewardFn) -> _Signature:
    parameters = list(inspect.signature(verifier).parameters.values())
    if not parameters or parameters[0].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
        raise ValueError(f"{function_name(verifier)}: a verifier takes the completion as its first argument")
    bound = verifier.keywords if isinstance(verifier, partial) else {}
    named = [p for p in parameters[1:] if p.name not in bound and p.kind in _BY_NAME]
    return _Signature(
        required={p.name for p in named if p.default is p.empty},
        named={p.name for p in named},
        takes_all=any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters),
        taken={parameters[0].name, *bound},
    )


def _arguments(verifier: RewardFn, signature: _Signature, prompts: PromptBatch, prompt: int) -> dict[str, Any]:
    """The columns of one prompt that the verifier takes."""
    columns = prompts.columns[prompt]
    missing = sorted(signature.required - columns.keys())
    if missing:
        raise RewardError(
            f"{function_name(verifier)} asks for {', '.join(missing)}, which prompt {prompts.number[prompt]} does not "
            f"have; its columns are {', '.join(columns) or 'none'}"
        )
    names = set(signature.named)
    if signature.takes_all:
        names |= columns.keys() - signature.taken
    return {name: value for name, value in columns.items() if name in names}


def prompt_indices(traj: Trajectory, prompts: PromptBatch) -> np.ndarray:
    """[B] the index in `prompts` of the prompt of each row, whose number is the row's group."""
    index = {int(number): i for i, number in enumerate(prompts.number)}
    group = [] if traj.group is None else np.asarray(traj.group).tolist()
    if traj.group is None or not set(group) <= index.keys():
        raise ValueError(f"score needs traj.group: the number of each row's prompt, one of {sorted(index)[:8]} ...")
    return np.array([index[number] for number in group], np.int64)


# ------------------------------------------------------------------------------------------------- results to rewards


def _raise_first_error(
    verifier: RewardFn, results: Sequence[Result], completions: Sequence[str], numbers: np.ndarray
) -> None:
    for result, completion, number in zip(results, completions, numbers, strict=True):
        if result.status == "error":
            shown = completion if len(completion) <= 200 else f"{completion[:100]} ... {completion[-100:]}"
            raise RewardError(
                f"{function_name(verifier)} failed on prompt {number}, completion {shown!r}: {result.detail}\n"
                "Legal: a finite number, or None where the verifier does not apply"
            )


def _as_arrays(results: Sequence[Sequence[Result]]) -> tuple[np.ndarray, np.ndarray]:
    """[B K] values, NaN where there is none; [B K] True where the verifier failed."""
    values = [[math.nan if result.value is None else result.value for result in of_one] for of_one in results]
    failed = [[result.status in FAILED for result in of_one] for of_one in results]
    return np.array(values, np.float64).T, np.array(failed, bool).T


def _rewards(values: np.ndarray, failed: np.ndarray, factors: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[B T] the weighted sum on the last chosen token, NaN there if the row has no reward, 0 elsewhere."""
    counts = factors != 0
    valid = np.isfinite(values) & counts
    total = np.where(valid, values * factors, 0.0).sum(1)
    total[~valid.any(1) | (failed & counts).any(1)] = np.nan
    rewards = np.zeros(mask.shape, np.float32)
    rows = np.flatnonzero(mask.any(1))
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
    rewards[rows, last[rows]] = total[rows]
    return rewards
