"""What the policy wrote, as lines of `samples.jsonl`: for reading, never for training.

One record an answer, whole groups together:

    {"step": 20, "group": 3,
     "prompt": "12+7=", "completion": "19", "columns": {"answer": "19"},
     "scores": {"exact": 1.0, "judge": null},            null: this verifier could not judge it
     "reward": 1.0, "length": 3,                         the sum over the answer; tokens that the policy chose
     "ended": true,                                      by a stop token; false: cut off; null: not known
     "tokens": {"id": [..], "text": [..], "chosen": [0, 0, 1, ..], "mask": [..],
                "advantage": [null, ..], "logp": [..], "log_ratio": [..]}}

`tokens` holds columns of equal length, one entry a token of prompt and answer; padding is left out. `chosen` is 1 where
the policy chose the token, `mask` where it is learned from; the numbers are null elsewhere. Four significant digits.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from rljax.types import Array, Batch, Trajectory

Decode = Callable[[list[int]], str]


def sample_records(
    step: int,
    batch: Batch,
    decode: Decode,
    *,
    names: Sequence[str] = (),
    columns: Sequence[Mapping] | None = None,
    log_ratio: Array | None = None,
    limit: int = 4,
) -> list[dict]:
    """The answers to the first `limit` prompts of an unpacked batch, as records.

    Args:
      decode: list of ids -> text; also asked for single tokens and pairs, so it may be lossy there.
      names: of the K verifiers whose results stand in `batch.traj.scores` [B K].
      columns: of the dataset, to be shown: B dicts, or P of them where B = P·G and the rows of a prompt are neighbours.
      log_ratio: [B T] log-prob of each decision after the update minus before it; None if nobody computed it.
    """
    traj = jax.device_get(batch.traj.replace(dist=None, routing=None))
    B = len(traj.mask)
    if traj.scores is not None and np.shape(traj.scores) != (B, len(names)):
        raise ValueError(f"{len(names)} names {tuple(names)} for scores of shape {np.shape(traj.scores)}")
    if columns and B % len(columns):
        raise ValueError(f"{len(columns)} dicts of columns for {B} rows: give one a row, or one a prompt")
    group = np.arange(B) if traj.group is None else traj.group
    shown = list(dict.fromkeys(group.tolist()))[:limit]
    rows = [b for g in shown for b in np.flatnonzero(group == g)]
    numbers = {"mask": batch.mask, "advantage": batch.advantages, "logp": traj.logp, "log_ratio": log_ratio}
    numbers = {name: np.asarray(value) for name, value in numbers.items() if value is not None}
    return [
        {
            "step": int(step),
            "group": int(group[b]),
            **_texts(traj, b, decode),
            "columns": {k: str(v)[:2000] for k, v in columns[b * len(columns) // B].items()} if columns else {},
            **_results(traj, b, names),
            "tokens": _tokens(traj, b, decode, numbers),
        }
        for b in rows
    ]


def _decisions(traj: Trajectory, b: int) -> np.ndarray:
    """The columns that hold row b's segment; where segments are not known, those up to the last choice."""
    mask = traj.mask[b]
    inside = mask[::-1].cumsum()[::-1] > 0 if traj.segments is None else traj.segments[b] > 0
    return np.flatnonzero(inside | mask)


def _ids(traj: Trajectory, b: int) -> tuple[list[int], np.ndarray]:
    """All S token ids of row b, and which of them the policy chose. The first token of all stands only in inputs."""
    at = _decisions(traj, b)
    ids = [int(traj.inputs[b, at[0]]), *traj.actions[b][at].tolist()] if len(at) else []
    return ids, np.append(False, traj.mask[b][at])[: len(ids)]


def _texts(traj: Trajectory, b: int, decode: Decode) -> dict:
    ids, chosen = _ids(traj, b)
    first = int(chosen.argmax()) if chosen.any() else len(ids)
    return {"prompt": decode(ids[:first]), "completion": decode(ids[first:])}


def _results(traj: Trajectory, b: int, names: Sequence[str]) -> dict:
    mask = traj.mask[b]
    scores = [] if traj.scores is None else traj.scores[b]
    reward = None if traj.rewards is None else rounded(traj.rewards[b][mask].sum())
    ended = None if traj.terminated is None else bool(traj.terminated[b][mask].any())
    return {
        "scores": {name: rounded(score) for name, score in zip(names, scores, strict=True)},
        "reward": reward,
        "length": int(mask.sum()),
        "ended": ended,
    }


def _tokens(traj: Trajectory, b: int, decode: Decode, numbers: Mapping[str, np.ndarray]) -> dict:
    at, (ids, chosen) = _decisions(traj, b), _ids(traj, b)
    out = {"id": ids, "text": token_texts(ids, decode), "chosen": chosen.astype(int).tolist()}
    for name, value in numbers.items():
        row = np.append(0, value[b, at])[: len(ids)]  # the first token of all was no decision
        out[name] = row.astype(int).tolist() if name == "mask" else _where(chosen, row)
    return out


def _where(chosen: np.ndarray, row: np.ndarray) -> list[float | None]:
    return [rounded(x) if c else None for x, c in zip(row, chosen, strict=True)]


def token_texts(ids: Sequence[int], decode: Decode) -> list[str]:
    """The text of each token: what it adds to the token before it, for a lone token may lose its leading space.

    >>> token_texts([1, 2], lambda ids: " ".join("-ab"[i] for i in ids))
    ['a', ' b']
    """
    out = []
    for before, token in zip([None, *ids], ids, strict=False):
        left = "" if before is None else decode([before])
        both = decode([token]) if before is None else decode([before, token])
        out.append(both[len(left) :] if both.startswith(left) and "\ufffd" not in left else decode([token]))
    return out


def rounded(value: float) -> float | None:
    """Four significant digits; None for what is not finite."""
    return float(f"{float(value):.4g}") if math.isfinite(value) else None
