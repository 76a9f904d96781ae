"""Completions with their rewards, and the jsonl files that a script goes on with where it was stopped."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from rljax.data.examples import prompt_of
from rljax.ops.returns import episode_rewards
from rljax.rewards.score import decode_completions
from rljax.train.log import write_atomically
from rljax.train.samples import Decode
from rljax.types import PromptBatch, Trajectory


def judged_prompts(traj: Trajectory, rows: PromptBatch, decode: Decode) -> list[dict]:
    """A record of each prompt of the batch with all of its completions and their rewards.

    Its `prompt` is what was sampled from: a text, or the messages of a conversation.
    """
    total, valid = (np.asarray(x) for x in episode_rewards(jnp.asarray(traj.rewards), traj.mask))
    rewards = [float(reward) if known else None for reward, known in zip(total, valid, strict=True)]
    completions = decode_completions(traj, decode)
    ended = ended_rows(traj)
    n = len(rewards) // len(rows.number)
    records = []
    for i, number in enumerate(rows.number.tolist()):
        own = slice(i * n, (i + 1) * n)
        records.append(
            {
                "number": number,
                "columns": rows.columns[i],
                "prompt": prompt_of(rows.as_read[i]),
                "completions": completions[own],
                "rewards": rewards[own],
                "ended": ended[own],
            }
        )
    return records


def ended_rows(traj: Trajectory) -> list[bool]:
    """Of each completion whether it ended by itself: the others were cut at max_tokens."""
    return (np.asarray(traj.terminated) & np.asarray(traj.mask)).any(axis=1).tolist()


def read_lines(path: Path) -> list[dict]:
    """The lines that an earlier run of the same command wrote. Half a line at the end is cut off."""
    if not path.is_file():
        return []
    whole, _, rest = path.read_bytes().rpartition(b"\n")  # it may be cut within a character
    text = whole.decode()
    if rest:
        write_atomically(path, text + "\n" * bool(text))
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def append_lines(path: Path, rows: Iterable[dict]) -> None:
    """Append the rows as lines of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(as_lines(rows))


def read_or_make(path: Path, make: Callable[[], dict]) -> dict:
    """The record in a file of JSON; where there is none, `make()` is called and its result is kept there."""
    if not path.is_file():
        write_atomically(path, json.dumps(make()))
    return json.loads(path.read_text(encoding="utf-8"))


def as_lines(rows: Iterable[dict]) -> str:
    """The rows as lines of JSON."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
