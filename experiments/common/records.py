"""Completions with their rewards, and the jsonl files that a script goes on with where it was stopped."""

import json
from collections.abc import Iterable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from rljax.ops.returns import episode_rewards
from rljax.rewards.score import text_after
from rljax.train.log import write_atomically
from rljax.train.samples import Decode
from rljax.types import PromptBatch, Trajectory


def judge_prompt(traj: Trajectory, rows: PromptBatch, i: int, prompt_text: str, decode: Decode) -> dict:
    """A record of prompt i of the batch with all of its completions and their rewards."""
    total, valid = (np.asarray(x) for x in episode_rewards(jnp.asarray(traj.rewards), traj.mask))
    n = len(total) // len(rows.number)
    own = range(i * n, (i + 1) * n)
    prompt_ids = rows.tokens[i][rows.mask[i]].tolist()
    mask = np.asarray(traj.mask)
    actions = np.asarray(traj.actions)
    ended = (np.asarray(traj.terminated) & mask).any(axis=1)
    return {
        "number": int(rows.number[i]),
        "columns": rows.columns[i],
        "prompt": prompt_text,
        "completions": [text_after(decode, prompt_ids, actions[b][mask[b]].tolist()) for b in own],
        "rewards": [float(total[b]) if valid[b] else None for b in own],
        "ended": [bool(ended[b]) for b in own],
    }


def read_lines(path: Path) -> list[dict]:
    """The lines that an earlier run of the same command wrote. Half a line at the end is cut off."""
    if not path.is_file():
        return []
    whole, _, rest = path.read_text(encoding="utf-8").rpartition("\n")
    if rest:
        write_atomically(path, whole + "\n" * bool(whole))
    return [json.loads(line) for line in whole.split("\n") if line]


def append_lines(path: Path, rows: Iterable[dict]) -> None:
    """Append the rows as lines of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(as_lines(rows))


def as_lines(rows: Iterable[dict]) -> str:
    """The rows as lines of JSON."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
