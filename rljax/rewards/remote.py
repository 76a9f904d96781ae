"""A reward model behind a URL, with OpenRLHF's protocol.

    POST {"query": [..], "prompts": [..], "labels": [..]}   ->   {"rewards": [..]}

one entry for each completion, in order. A query is prompt and completion as one text, special tokens included;
`prompts` holds the part that was the prompt; a label is the dataset's column "answer", or "label", or "". A reward is a
finite number; null is "could not be judged".
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rljax.rewards.score import ModelReward, decode_rows, prompt_indices
from rljax.rewards.server import (
    DEFAULT_LIMITS,
    AnswerCache,
    Limits,
    Reply,
    RequestError,
    ask_all,
    finite_number,
    request_json,
)
from rljax.rewards.worker import Result
from rljax.types import PromptBatch, Trajectory


def make_remote_reward(
    url: str,
    decode: Callable[[list[int]], str],
    limits: Limits = DEFAULT_LIMITS,
    cache: AnswerCache | None = None,
    batch_size: int = 32,
) -> ModelReward:
    """reward(traj, prompts) -> a Result for each row, from the server.

    Args:
      decode: token ids -> text with special tokens. batch_size: completions in a request.
      cache: of answers; None: one of this process.
    """
    cache = cache or AnswerCache()

    def ask(questions: list[Any]) -> list[Reply]:
        batches = [questions[start : start + batch_size] for start in range(0, len(questions), batch_size)]
        replies = ask_all(partial(_ask_for_batch, url), batches, limits)
        return [_of_row(reply, row) for batch, reply in zip(batches, replies, strict=True) for row in range(len(batch))]

    def reward(traj: Trajectory, prompts: PromptBatch) -> list[Result]:
        labels = [_label(prompts.columns[index]) for index in prompt_indices(traj, prompts)]
        rows = decode_rows(traj, decode)
        questions = [
            [url, row.prompt + row.completion, row.prompt, label] for row, label in zip(rows, labels, strict=True)
        ]
        return [Result(*reply) for reply in cache.fetch(questions, traj.group, ask)]

    return reward


def _label(columns: dict) -> Any:
    """The column that a server compares with, as JSON."""
    label = columns.get("answer", columns.get("label", ""))
    try:
        json.dumps(label)
    except (TypeError, ValueError):
        return str(label)
    return label


def _ask_for_batch(url: str, questions: Sequence[Any], seconds: float) -> list[Any]:
    """The rewards of some completions. Raises RequestError unless there is one for each."""
    _, queries, prompts, labels = map(list, zip(*questions, strict=True))
    answer = request_json(url, {"query": queries, "prompts": prompts, "labels": labels}, seconds)
    rewards = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(rewards, list) or len(rewards) != len(questions):
        shown = json.dumps(answer)[:200]
        raise RequestError("invalid", f"no list 'rewards' of {len(questions)} numbers in the answer {shown}")
    return rewards


def _of_row(reply: Reply, row: int) -> Reply:
    """The reply to one row of a batch."""
    if reply.status != "ok":
        return reply
    value = finite_number(reply.value[row])
    if value is None:
        shown = json.dumps(reply.value[row])[:100]
        return Reply(None, "invalid", f"the reward is {shown}; legal: a finite number; null: could not be judged")
    return Reply(value, "ok")
