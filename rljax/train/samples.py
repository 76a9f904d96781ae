"""Samples of what the policy wrote, as records of `samples.jsonl`: for reading, never for training.

One record per completion, whole groups together:

    {"step": 20, "group": 3,
     "prompt": "12+7=", "completion": "19", "columns": {"answer": "19"},
     "scores": {"exact": 1.0, "judge": null},            null: this verifier failed or does not apply
     "reward": 1.0, "length": 3,                         the sum over the completion; tokens that the policy chose
     "ended": true,                                      by a stop token; false: truncated; null: unknown
     "tokens": {"id": [..], "text": [..], "chosen": [0, 0, 1, ..], "mask": [..],
                "advantage": [null, ..], "logp": [..], "kl": [..], "log_ratio": [..], "entropy": [..]}}

`tokens` holds columns of equal length, one entry per token of prompt and completion; padding is left out. `chosen` is 1
where the policy chose the token, `mask` where it is trained on; the numbers are null elsewhere, and columns that the
run did not compute are absent. `kl` is log π_behavior - log π_ref: its sum over a completion estimates the KL of the
sequence. `log_ratio` is log π - log π_behavior and `entropy` that of π, after the update. Numbers have four significant
digits.

A conversation of several turns also has its parts after the prompt, in order: turns of the policy, and between them
what it was answered. `start` and `end` are their tokens in the columns, `notes` what the environment says of the turn:

     "turns": [{"policy": 1, "text": "<calc(2*3)>", "start": 4, "end": 16, "reward": 0.0, "notes": "tool calls 1"},
               {"policy": 0, "text": "6=", "start": 16, "end": 18}, ..]
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rljax.ops.decoding import text_after
from rljax.types import Array, Batch, Trajectory

Decode = Callable[[list[int]], str]  # token ids -> text

MAX_COLUMN_CHARACTERS = 2000
MAX_DECODED = 2**17  # tokens and pairs of them whose text is kept while records are made
SHOWN_PROMPTS = 4  # of a batch
MAX_SAMPLED_STEPS = 24  # in a report, evenly spaced
MAX_SAMPLED_BYTES = 24_000_000  # of completions in a report


def sample_records(
    step: int,
    batch: Batch,
    decode: Decode,
    *,
    names: Sequence[str] = (),
    columns: Sequence[Mapping[str, Any]] | None = None,
    token_columns: Mapping[str, Array] | None = None,
    turn_notes: Sequence[Sequence[str]] | None = None,
    limit: int = SHOWN_PROMPTS,
) -> list[dict]:
    """The completions of the first `limit` prompts of an unpacked batch, as records.

    Args:
      decode: list of ids -> text, a pure function; also called on single tokens and pairs, where it may be lossy.
      names: of the K verifiers whose results are `batch.traj.scores` [B K].
      columns: of the dataset, to be shown: B dicts, or P of them where B = P·G and the rows of a prompt are adjacent.
      token_columns: further numbers [B T] of each decision by name, such as `log_ratio` and `entropy`.
      turn_notes: of each of B conversations, a text for each turn of the policy.

    Raises ValueError where `names` or `columns` do not fit the batch.
    """
    traj = jax.device_get(batch.traj.replace(dist=None, routing=None, support=None))
    B = len(traj.mask)
    if traj.scores is not None and np.shape(traj.scores) != (B, len(names)):
        raise ValueError(f"{len(names)} names {tuple(names)} for scores of shape {np.shape(traj.scores)}")
    if columns and B % len(columns):
        raise ValueError(f"{len(columns)} dicts of columns for {B} rows: give one a row, or one a prompt")
    group = np.arange(B) if traj.group is None else traj.group
    per_token = {"mask": batch.mask, "advantage": batch.advantages, "logp": traj.logp}
    if traj.ref_logp is not None:
        per_token["kl"] = traj.logp - traj.ref_logp
    per_token = {name: np.asarray(value) for name, value in {**per_token, **(token_columns or {})}.items()}
    decode_few = lru_cache(MAX_DECODED)(lambda *ids: decode(list(ids)))
    return [
        {
            "step": int(step),
            "group": int(group[b]),
            **_texts(traj, b, decode),
            "columns": _columns_as_text(columns[b * len(columns) // B]) if columns else {},
            **_rewards(traj, b, names),
            **_turns(traj, b, decode, turn_notes[b] if turn_notes else ()),
            "tokens": _token_columns(traj, b, lambda ids: decode_few(*ids), per_token),
        }
        for b in shown_rows(group, limit)
    ]


def shown_rows(group: np.ndarray, limit: int = SHOWN_PROMPTS) -> np.ndarray:
    """Indices of the rows of the first `limit` prompts, those of a prompt together. group: [B] the prompt of each row.

    >>> shown_rows(np.array([5, 2, 5, 7]), limit=2)
    array([0, 2, 1])
    """
    first = list(dict.fromkeys(group.tolist()))[:limit]
    return np.concatenate([np.flatnonzero(group == number) for number in first])


def _columns_as_text(columns: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value)[:MAX_COLUMN_CHARACTERS] for name, value in columns.items()}


def _decisions(traj: Trajectory, b: int) -> np.ndarray:
    """The columns that hold row b's segment; where segments are not known, those up to the last choice."""
    mask = traj.mask[b]
    inside = mask[::-1].cumsum()[::-1] > 0 if traj.segments is None else traj.segments[b] > 0
    return np.flatnonzero(inside | mask)


def _token_ids(traj: Trajectory, b: int) -> tuple[list[int], np.ndarray]:
    """All S token ids of row b, and which of them the policy chose. The very first token stands only in `inputs`."""
    decisions = _decisions(traj, b)
    ids = []
    if len(decisions):
        ids = [int(traj.inputs[b, decisions[0]]), *traj.actions[b][decisions].tolist()]
    chosen = np.append(False, traj.mask[b][decisions])
    return ids, chosen[: len(ids)]


def _texts(traj: Trajectory, b: int, decode: Decode) -> dict[str, str]:
    ids, chosen = _token_ids(traj, b)
    first = int(chosen.argmax()) if chosen.any() else len(ids)
    return {"prompt": decode(ids[:first]), "completion": text_after(decode, ids[:first], ids[first:])}


def _rewards(traj: Trajectory, b: int, names: Sequence[str]) -> dict[str, Any]:
    mask = traj.mask[b]
    scores = [] if traj.scores is None else traj.scores[b]
    reward = None if traj.rewards is None else round_or_none(traj.rewards[b][mask].sum())
    ended = None if traj.terminated is None else bool(traj.terminated[b][mask].any())
    return {
        "scores": {name: round_or_none(score) for name, score in zip(names, scores, strict=True)},
        "reward": reward,
        "length": int(mask.sum()),
        "ended": ended,
    }


def _turns(traj: Trajectory, b: int, decode: Decode, notes: Sequence[str]) -> dict[str, list]:
    """{"turns": the parts of the conversation after its prompt}; nothing where there is one turn, without an answer."""
    ids, chosen = _token_ids(traj, b)
    edges = [*(np.flatnonzero(np.diff(chosen)) + 1).tolist(), len(ids)]  # the first part is the prompt
    if len(edges) <= 2:
        return {}
    rewards = None if traj.rewards is None else np.append(0, traj.rewards[b][_decisions(traj, b)])
    turns = []
    for start, end in pairwise(edges):
        turn = {"policy": int(chosen[start]), "text": text_after(decode, ids[:start], ids[start:end])}
        turn |= {"start": start, "end": end}
        if chosen[start]:
            number = len(turns) // 2
            turn["reward"] = None if rewards is None else round_or_none(rewards[start:end].sum())
            turn["notes"] = notes[number] if number < len(notes) else ""
        turns.append(turn)
    return {"turns": turns}


def _token_columns(traj: Trajectory, b: int, decode: Decode, per_token: Mapping[str, np.ndarray]) -> dict[str, list]:
    decisions = _decisions(traj, b)
    ids, chosen = _token_ids(traj, b)
    columns = {"id": ids, "text": token_texts(ids, decode), "chosen": chosen.astype(int).tolist()}
    for name, values in per_token.items():
        row = np.append(0, values[b, decisions])[: len(ids)]  # the very first token was no decision
        if name == "mask":
            columns[name] = row.astype(int).tolist()
        else:
            columns[name] = [round_or_none(x) if is_chosen else None for x, is_chosen in zip(row, chosen, strict=True)]
    return columns


def token_texts(ids: Sequence[int], decode: Decode) -> list[str]:
    """The text of each token: what it adds to the token before it, as a token alone may lose its leading space.

    >>> token_texts([1, 2], lambda ids: " ".join("-ab"[i] for i in ids))
    ['a', ' b']
    """
    texts = []
    for previous, token in zip([None, *ids], ids, strict=False):
        alone = decode([token])
        before = "" if previous is None else decode([previous])
        both = alone if previous is None else decode([previous, token])
        if both.startswith(before) and "\ufffd" not in before:
            texts.append(both[len(before) :])
        else:
            texts.append(alone)
    return texts


def round_or_none(value: float) -> float | None:
    """Four significant digits; None for what is not finite."""
    return float(f"{float(value):.4g}") if math.isfinite(value) else None


# ----------------------------------------------------------------------------------------------------- read them back


def read_samples(path: Path, limit: int = MAX_SAMPLED_STEPS, size: int = MAX_SAMPLED_BYTES) -> dict:
    """The completions of at most `limit` steps, the first and the last included.

    Of each step the first groups are read, as many as fit into its part of `size` bytes, at least one.

    Returns: {"steps": [{"step", "records", "groups_left_out"}], "left_out": number of steps}.
    """
    index = _index_groups(path)
    chosen = evenly_spaced(sorted(index), limit)
    steps = [_read_step(path, step, index[step], size // len(chosen)) for step in chosen]
    return {"steps": steps, "left_out": len(index) - len(steps)}


def evenly_spaced(items: Sequence, limit: int) -> list:
    """At most `limit` of them, the first and the last included.

    >>> evenly_spaced(range(100), 4)
    [0, 33, 66, 99]
    """
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


Lines = list[tuple[int, int]]  # offset and bytes of each


def _index_groups(path: Path) -> dict[int, dict[int, Lines]]:
    """Step -> group -> its lines, unparsed: a long run logs more completions than fit into memory."""
    index: dict[int, dict[int, Lines]] = {}
    if not path.exists():
        return index
    offset = 0
    with open(path, "rb") as file:
        for line in file:
            start = re.match(rb'\{"step": (\d+), "group": (-?\d+),', line)
            is_complete = line.endswith(b"}\n")
            if start and is_complete:
                step, group = map(int, start.groups())
                index.setdefault(step, {}).setdefault(group, []).append((offset, len(line)))
            offset += len(line)
    return index


def _read_step(path: Path, step: int, groups: dict[int, Lines], size: int) -> dict:
    """The records of one step, whole groups of at most `size` bytes together, but at least the first group.

    No more than these are parsed.
    """
    used = np.cumsum([sum(length for _, length in lines) for lines in groups.values()])
    kept = max(1, int(np.searchsorted(used, size, side="right")))
    records = []
    with open(path, "rb") as file:
        for lines in list(groups.values())[:kept]:
            for offset, length in lines:
                file.seek(offset)
                records.append(json.loads(file.read(length)))
    return {"step": step, "records": records, "groups_left_out": len(groups) - kept}
