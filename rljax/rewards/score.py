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
is "could not be judged", as when no result came in time. It may also return the scores of a completion's steps: then
`scores[b, k]` is the least of them, and each is rewarded where its step ends.

A reward with a condition counts where the other reward is above 0, and is 0 elsewhere: an easy reward (a format) that
cannot be had without the hard one (a right answer). Where the other has no score, it has none.

A rollout of which too many rows could not be judged is an error too: what is left of it is no fair sample.

A verifier or model reward with weight 0 is recorded only: it neither gives a row a reward nor takes it away.
"""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from rljax.ops.decoding import text_after
from rljax.rewards.function_path import function_name
from rljax.rewards.pool import Pool
from rljax.rewards.server import in_background
from rljax.rewards.worker import FAILED, MAX_FLOAT32, Result, call_verifier
from rljax.types import Array, PromptBatch, RewardFn, Trajectory


class StepScores(NamedTuple):
    """A process reward: a number for each step of a completion, on the decision at which the step ends."""

    scores: Array  # [B T]; NaN at a step that could not be judged
    ends: Array  # [B T] bool


# A reward model or a server: (trajectory, prompts) -> a number or a Result for each row, or the scores of its steps.
ModelReward = Callable[[Trajectory, PromptBatch], Array | Sequence[Result] | StepScores]


JUDGED_FIELDS = ("inputs", "actions", "logp", "mask", "segments", "group")
LEGAL = "Legal: a finite number, or None where the verifier does not apply"


class RewardError(Exception):
    """A verifier has a bug, or asks for a column that the dataset does not have."""


class Score(NamedTuple):
    """`score(traj, prompts) -> traj` with `scores` and `rewards`; column k of `scores` is the reward `names[k]`."""

    names: tuple[str, ...]
    call: Callable[[Trajectory, PromptBatch], Trajectory]

    def __call__(self, traj: Trajectory, prompts: PromptBatch) -> Trajectory:
        return self.call(traj, prompts)


def judge_all(judge: Callable[[np.ndarray], Sequence[Any]], group: Array) -> list[Any]:
    """What judge(indices of rows) returns for all rows."""
    return list(judge(np.arange(len(group))))


class Hosts(NamedTuple):
    """How the processes of a run judge a rollout together; by default there is one, which judges every row."""

    fetch: Callable[[Any], Any] = jax.device_get  # arrays -> the same as numpy, whole on every process
    share_rows: Callable[[Callable[[np.ndarray], Sequence[Any]], Array], list[Any]] = judge_all


def make_score(
    verifiers: Mapping[str, RewardFn],
    decode: Callable[[list[int]], str],
    weights: Mapping[str, float] | None = None,
    pool: Pool | None = None,
    model_rewards: Mapping[str, ModelReward] | None = None,
    conditions: Mapping[str, str] | None = None,
    max_failed: float = 1.0,
    report: Callable[[str], None] | None = None,
    hosts: Hosts = Hosts(),  # noqa: B008 (immutable)
    servers: Mapping[str, ModelReward] | None = None,
) -> Score:
    """The function that scores a rollout.

    Args:
      verifiers: by name, as in the logs and in `weights`.
      decode: chosen token ids, EOS included -> text without special tokens.
      weights: name -> factor in the reward; 1 where not given.
      pool: None calls the verifiers in this process, where nothing stops one that hangs; the numbers are the same.
      model_rewards: by name, which no verifier has; their columns follow those of the verifiers.
      conditions: name -> the reward that must be above 0 for it to count. One that has a condition itself comes first.
      max_failed: share of a rollout's rows that a reward with a weight may leave without a judgement.
      report: called with a line for each reward that left rows without one.
      hosts: where several processes hold the rollout, each calls verifiers and servers on rows of its own, and a model
        reward is called on all.
      servers: model rewards, by name, that wait for answers from elsewhere: each is asked in a thread of its own, while
        the verifiers judge. They get `JUDGED_FIELDS` of the rows, on the host. Their columns come last.

    Returns: `Score`. It reads `group` (row b completes the prompt with number `group[b]`), `actions` and `mask`, and
    fills `scores` and `reward_weights` [B K] float32 and `rewards` [B T] float32: the weighted sum on the last chosen
    token according to the mask, 0 elsewhere. Where steps are rewarded, theirs are added where they end, and
    `step_ends` is filled. A row without a chosen token gets scores, and rewards of 0.
    Raises RewardError naming the verifier, the prompt and the completion, or saying what became of the rows where too
    many were not judged; ValueError for unknown weights.
    """
    model_rewards = model_rewards or {}
    servers = servers or {}
    names = (*verifiers, *model_rewards, *servers)
    factors = _factors(names, weights or {})
    pairs = _column_pairs(names, conditions or {})
    signatures = {name: read_signature(verifier) for name, verifier in verifiers.items()}

    def call(traj: Trajectory, prompts: PromptBatch) -> Trajectory:
        rows = hosts.fetch(Trajectory(**{name: getattr(traj, name) for name in JUDGED_FIELDS}))
        mask = rows.mask
        prompt_indices(rows, prompts)  # refused for the same row on every process
        judged = _judge_rows(verifiers, signatures, servers, rows, prompts, decode, pool, hosts)
        by_models, steps_of = _call_models(model_rewards, traj, prompts, mask, hosts)
        results = judged[: len(verifiers)] + by_models + judged[len(verifiers) :]
        steps = {names.index(name): found for name, found in steps_of.items()}
        for name, factor, of_one in zip(names, factors, results, strict=True):
            _check_failed(name, of_one, max_failed if factor else 1.0, report)
        values, failed = _as_arrays(results)
        counts = _apply_conditions(values, failed, pairs)
        of_steps = np.isin(np.arange(len(names)), list(steps))
        rewards = _rewards(values, failed, factors, mask, of_steps)
        for k, found in steps.items():
            rewards += _step_rewards(found, factors[k], mask & counts[:, k, None])
        return traj.replace(
            scores=values.astype(np.float32),
            reward_weights=np.broadcast_to(factors.astype(np.float32), values.shape),
            rewards=rewards,
            step_ends=_all_ends(steps.values(), mask) if steps else traj.step_ends,
        )

    return Score(names, call)


def _judge_rows(
    verifiers: Mapping[str, RewardFn],
    signatures: Mapping[str, "Signature"],
    servers: Mapping[str, ModelReward],
    rows: Trajectory,
    prompts: PromptBatch,
    decode: Callable[[list[int]], str],
    pool: Pool | None,
    hosts: Hosts,
) -> list[list[Result]]:
    """The Results of each verifier and each server on all rows, of which this process decodes and judges its own."""
    if not (verifiers or servers):
        return []

    def judge(own: np.ndarray) -> list[tuple[Result, ...]]:
        part = jax.tree.map(lambda x: x[own], rows)
        asked = {name: in_background(server, part, prompts) for name, server in servers.items()}
        results = []
        if verifiers:
            completions = decode_completions(part, decode)
            results = _call_verifiers(verifiers, signatures, completions, prompts, prompt_indices(part, prompts), pool)
        results += [_results_of_rows(name, answers(), len(own)) for name, answers in asked.items()]
        return list(zip(*results, strict=True))

    of_rows = hosts.share_rows(judge, rows.group)
    return [[results[k] for results in of_rows] for k in range(len(verifiers) + len(servers))]


def _call_models(
    model_rewards: Mapping[str, ModelReward], traj: Trajectory, prompts: PromptBatch, mask: np.ndarray, hosts: Hosts
) -> tuple[list[list[Result]], dict[str, StepScores]]:
    """The Results of each model reward on all rows, and by name the scores of steps where it judges these."""
    results = []
    steps = {}
    for name, model_reward in model_rewards.items():
        returned = model_reward(traj, prompts)
        if isinstance(returned, StepScores):
            returned = hosts.fetch(returned)
            steps[name] = returned
            returned = _least_step(returned, mask)
        results.append(_results_of_rows(name, returned, len(mask)))
    return results, steps


def _call_verifiers(
    verifiers: Mapping[str, RewardFn],
    signatures: Mapping[str, "Signature"],
    completions: Sequence[str],
    prompts: PromptBatch,
    indices: np.ndarray,
    pool: Pool | None,
) -> list[list[Result]]:
    """The Results of each verifier on each completion, which answers the prompt with that index."""
    work = []
    for name, verifier in verifiers.items():
        arguments = [
            columns_taken(name, signatures[name], prompts.columns[i], f"prompt {prompts.number[i]}") for i in indices
        ]
        calls = [((completion,), kwargs) for completion, kwargs in zip(completions, arguments, strict=True)]
        work.append((verifier, calls))
    if pool is None:
        results = [[call_verifier(verifier, *call) for call in calls] for verifier, calls in work]
    else:
        results = pool.map_each(work)
    for name, returned in zip(verifiers, results, strict=True):
        _raise_first_error(name, returned, completions, prompts.number[indices])
    return results


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


def _column_pairs(names: tuple[str, ...], conditions: Mapping[str, str]) -> list[tuple[int, int]]:
    """(column, column of its condition), in the order of `conditions`. Raises ValueError for names that are none."""
    known = set(names) - conditions.keys()  # rewards whose score is final when the condition is applied
    pairs = []
    for name, condition in conditions.items():
        if name not in names or condition not in known:
            raise ValueError(
                f"{name!r} counts where {condition!r} is above 0; legal: two rewards of {', '.join(names)}, the second "
                "without a condition or with one that comes first"
            )
        pairs.append((names.index(name), names.index(condition)))
        known.add(name)
    return pairs


def _apply_conditions(values: np.ndarray, failed: np.ndarray, pairs: list[tuple[int, int]]) -> np.ndarray:
    """Sets `values` to 0 where the condition does not hold, and to NaN where it has no value.

    Returns [B K]: False where a condition does not hold.
    """
    counts = np.ones(values.shape, bool)
    for k, condition in pairs:
        counts[:, k] = values[:, condition] > 0
        values[:, k] = np.where(counts[:, k], values[:, k], 0.0 * values[:, condition])
        failed[:, k] = np.where(counts[:, k], failed[:, k], failed[:, condition])
    return counts


def _least_step(steps: StepScores, mask: np.ndarray) -> np.ndarray:
    """[B] the least score of a row's steps; NaN where there is none, or where one is NaN."""
    ends = np.asarray(steps.ends) & mask
    least = np.where(ends, np.asarray(steps.scores, np.float64), np.inf).min(axis=1, initial=np.inf)
    return np.where(ends.any(axis=1), least, np.nan)


def _step_rewards(steps: StepScores, factor: float, mask: np.ndarray) -> np.ndarray:
    """[B T] the weighted scores where steps end, 0 elsewhere."""
    if factor == 0:
        return np.zeros(mask.shape, np.float32)
    return np.where(np.asarray(steps.ends) & mask, factor * np.asarray(steps.scores), 0.0).astype(np.float32)


def _all_ends(steps: Iterable[StepScores], mask: np.ndarray) -> np.ndarray:
    """[B T] True where a step of any of these ends."""
    return np.any([np.asarray(found.ends) & mask for found in steps], axis=0)


def _results_of_rows(name: str, returned: Array | Sequence[Result], rows: int) -> list[Result]:
    """A Result for each row. Raises RewardError unless there is a number, NaN or a Result for each."""
    if isinstance(returned, list) and all(isinstance(result, Result) for result in returned):
        results = returned
    else:
        results = [_result_of_number(float(value)) for value in np.asarray(returned, np.float64).ravel()]
    wrong = [result.detail for result in results if result.status == "error"]
    if len(results) != rows:
        wrong = [f"it returned {len(results)} numbers for {rows} rows"]
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
    mask = np.asarray(traj.mask)
    ended = np.zeros(len(mask), bool)
    if traj.terminated is not None:
        ended = (np.asarray(traj.terminated) & mask).any(axis=1)
    prompts = [decode(prompt) for prompt in _prompt_ids(traj)]
    return [RowText(*row) for row in zip(prompts, decode_completions(traj, decode), ended.tolist(), strict=True)]


def decode_completions(traj: Trajectory, decode: Callable[[list[int]], str]) -> list[str]:
    """The completion of each row, as it continues its prompt: decoded alone, its first space may be lost."""
    chosen = [actions[kept].tolist() for actions, kept in zip(*map(np.asarray, (traj.actions, traj.mask)), strict=True)]
    return [text_after(decode, prompt, ids) for prompt, ids in zip(_prompt_ids(traj), chosen, strict=True)]


def _prompt_ids(traj: Trajectory) -> list[list[int]]:
    """The ids of each row that were read before its first decision."""
    mask = np.asarray(traj.mask)
    present = np.ones(mask.shape, bool) if traj.segments is None else np.asarray(traj.segments) > 0
    before = np.cumsum(mask, axis=1) - mask == 0  # up to and with the input of the first decision
    return [ids[kept].tolist() for ids, kept in zip(np.asarray(traj.inputs), before & present, strict=True)]


# ---------------------------------------------------------------------------------------- the arguments of a verifier


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Signature(NamedTuple):
    """The dataset columns that a verifier takes."""

    required: set[str]  # named, without a default
    named: set[str]
    takes_all: bool  # **kwargs: all columns
    taken: set[str]  # the name of the completion's parameter, and what a partial has bound


def read_signature(verifier: RewardFn) -> Signature:
    """Which columns a verifier takes. Raises ValueError for a function that takes no completion."""
    parameters = list(inspect.signature(verifier).parameters.values())
    if not parameters or parameters[0].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
        raise ValueError(f"{function_name(verifier)}: a verifier takes the completion as its first argument")
    bound = verifier.keywords if isinstance(verifier, partial) else {}
    named = [p for p in parameters[1:] if p.name not in bound and p.kind in _BY_NAME]
    return Signature(
        required={p.name for p in named if p.default is p.empty},
        named={p.name for p in named},
        takes_all=any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters),
        taken={parameters[0].name, *bound},
    )


def columns_taken(name: str, signature: Signature, columns: Mapping[str, Any], row: str) -> dict[str, Any]:
    """The columns of a row that the verifier takes. Raises RewardError, naming both, where one is missing."""
    missing = sorted(signature.required - columns.keys())
    if missing:
        raise RewardError(
            f"{name} asks for {', '.join(missing)}, which {row} does not have; its columns are "
            f"{', '.join(columns) or 'none'}"
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


def _raise_first_error(name: str, results: Sequence[Result], completions: Sequence[str], numbers: np.ndarray) -> None:
    for result, completion, number in zip(results, completions, numbers, strict=True):
        if result.status == "error":
            shown = completion if len(completion) <= 200 else f"{completion[:100]} ... {completion[-100:]}"
            raise RewardError(f"{name} failed on prompt {number}, completion {shown!r}: {result.detail}\n{LEGAL}")


def _check_failed(
    name: str, results: Sequence[Result], max_failed: float, report: Callable[[str], None] | None
) -> None:
    """Reports the rows that could not be judged, by status. Raises RewardError where there are too many."""
    failed = [result for result in results if result.status in FAILED]
    if not failed:
        return
    counts = Counter(result.status for result in failed)
    shown = ", ".join(f"{status} {count}" for status, count in counts.items())
    detail = f"; the first: {failed[0].detail}" if failed[0].detail else ""
    line = f"{name} did not judge {len(failed)} of {len(results)} completions: {shown}{detail}"
    if len(failed) > max_failed * len(results):
        raise RewardError(f"{line}. Legal: at most {max_failed:.0%} of a rollout")
    if report is not None:
        report(line)


def _as_arrays(results: Sequence[Sequence[Result]]) -> tuple[np.ndarray, np.ndarray]:
    """[B K] values, NaN where there is none; [B K] True where the verifier failed."""
    values = [[math.nan if result.value is None else result.value for result in of_one] for of_one in results]
    failed = [[result.status in FAILED for result in of_one] for of_one in results]
    return np.array(values, np.float64).T, np.array(failed, bool).T


def _rewards(
    values: np.ndarray, failed: np.ndarray, factors: np.ndarray, mask: np.ndarray, of_steps: np.ndarray
) -> np.ndarray:
    """[B T] the weighted sum on the last chosen token, NaN there if the row has no reward, 0 elsewhere.

    of_steps: [K] True for rewards that stand where steps end instead.
    """
    counts = factors != 0
    valid = np.isfinite(values) & counts
    total = np.where(valid & ~of_steps, values * factors, 0.0).sum(1)
    total[~valid.any(1) | (failed & counts).any(1)] = np.nan
    rewards = np.zeros(mask.shape, np.float32)
    rows = np.flatnonzero(mask.any(1))
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
    rewards[rows, last[rows]] = total[rows]
    return rewards
