"""Reward models and process reward models of a directory, as rewards of a rollout."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.common import data, models
from rljax.data.chat import encode_after
from rljax.data.examples import answer, demonstration, prompt_of, without_end
from rljax.data.formats import is_conversation
from rljax.data.prompts import pad_left, padded_width
from rljax.data.tokenizer import Tokenizer, load_tokenizer
from rljax.models import heads, hf
from rljax.models.decoder import DecoderConfig
from rljax.ops.ranking import min_over_steps
from rljax.rewards.score import ModelReward, RowText, StepScores, decode_rows, prompt_indices
from rljax.rewards.steps import mark_step_ends
from rljax.train import distributed
from rljax.train.log import log_info
from rljax.train.mesh import RULES, data_parallel_size, hidden_sharding, place
from rljax.types import Params, PromptBatch, Trajectory, trajectory_of_tokens

PIECE_TOKENS = 8192  # tokens on a device at a time when a reward model reads a rollout


def load_reward_model(
    directory: str | Path, mesh: jax.sharding.Mesh, tokenizer: Tokenizer, dtype: str = "float32"
) -> ModelReward:
    """reward(traj, prompts) -> the score of each completion [B], by the sequence classifier in `directory`.

    A reward model with the vocabulary of the policy reads the token ids that were sampled. One with another vocabulary
    reads the text, in its own tokens and chat template. The score is the head's output after
    the last token. A row that is longer than the model's context is not judged.

    Args:
      tokenizer: of the policy. dtype: in which the model is held and computes.
    Raises ValueError for a directory that holds no reward model.
    """
    config, params, own = _load_scorer(directory, mesh, dtype)
    score_rows = make_score_rows(config, params, mesh)
    if own.vocabulary() == tokenizer.vocabulary():
        return lambda traj, prompts: score_rows(traj)
    log_info(f"{directory} has another vocabulary than the policy: it reads prompts and completions as text")
    return lambda traj, prompts: score_rows(encode_again(distributed.fetch(traj), prompts, tokenizer, own))


def load_process_reward_model(
    directory: str | Path,
    mesh: jax.sharding.Mesh,
    tokenizer: Tokenizer,
    separator: str,
    per_step: bool,
    dtype: str = "float32",
) -> ModelReward:
    """reward(traj, prompts) -> the probability that a step is right, σ(head's output), behind the step's separator.

    With `per_step` that of each step, else [B]: the least of a completion's steps. A last step without a separator is
    read with one, as in training (`data.examples.steps`). Raises ValueError for a model with another vocabulary than
    the policy's.
    """
    config, params, own = _load_scorer(directory, mesh, dtype)
    if own.vocabulary() != tokenizer.vocabulary():
        raise ValueError(f"{directory} judges steps, and its vocabulary is not the policy's; legal: the same")
    score_tokens = make_score_rows(config, params, mesh, heads.make_process_reward_model)
    token_bytes = data.token_bytes(tokenizer, config.vocab_size)

    def reward(traj: Trajectory, prompts: PromptBatch) -> StepScores | np.ndarray:
        traj = distributed.fetch(traj)
        ends = mark_step_ends(traj, token_bytes, separator)
        steps = close_last_steps(traj, ends, token_bytes, tokenizer, separator)
        rows, _ = np.nonzero(ends)
        logits = np.zeros(ends.shape, np.float32)
        logits[ends] = score_tokens(steps.traj)[rows, steps.columns]
        probability = jax.nn.sigmoid(logits)
        return StepScores(probability, ends) if per_step else min_over_steps(probability, jnp.asarray(ends))

    return reward


class ClosedSteps(NamedTuple):
    """Rows of tokens that end with their last step, and where the steps end there."""

    traj: Trajectory
    columns: np.ndarray  # of all rows one after another: the column that chose the last token of each step


def close_last_steps(
    traj: Trajectory, ends: np.ndarray, token_bytes: Sequence[bytes], tokenizer: Tokenizer, separator: str
) -> ClosedSteps:
    """The rows to the end of their last step, which is encoded again, with a separator, where it lacks one."""
    rows, places = [], []
    for b in range(len(ends)):
        present = np.asarray(traj.segments[b]) > 0
        tokens = [*traj.inputs[b][present].tolist(), int(traj.actions[b][present][-1])]
        place = np.cumsum(present)  # of what a column chose, among the tokens
        columns = np.flatnonzero(ends[b])
        if len(columns):
            decisions = np.flatnonzero(traj.mask[b])
            start = place[decisions[decisions > columns[-2]][0] if len(columns) > 1 else decisions[0]]
            tokens = tokens[: place[columns[-1]] + 1]
            tokens[start:] = _closed(tokens[:start], tokens[start:], token_bytes, tokenizer, separator)
        rows.append(tokens)
        places.append([*place[columns[:-1]], len(tokens) - 1][: len(columns)])
    width = padded_width(max(map(len, rows)))
    columns = [width - len(row) + place - 1 for row, of_row in zip(rows, places, strict=True) for place in of_row]
    return ClosedSteps(_rows_of_tokens(rows, width, tokenizer.pad), np.array(columns, np.int64))


def _closed(
    before: list[int], step: list[int], token_bytes: Sequence[bytes], tokenizer: Tokenizer, separator: str
) -> list[int]:
    """The ids of a step that ends with the separator. Special tokens are no part of a step."""
    text = b"".join(token_bytes[i] for i in step)
    if separator.encode() in text:
        return step
    closed = text.decode(errors="replace") + separator
    return encode_after(tokenizer.decode_all(before), closed, tokenizer.encode_more, tokenizer.encode_more)


def _load_scorer(directory: str | Path, mesh: jax.sharding.Mesh, dtype: str) -> tuple[DecoderConfig, Params, Tokenizer]:
    """Config, parameters and tokenizer of a sequence classifier.

    It is trained with one table of positions: rows that longrope has another one for count as beyond its context.
    """
    config = hf.read_config(directory, reward_model=True)
    longest = hf.longrope_limit(directory) or config.max_positions
    config = dataclasses.replace(
        config, dtype=dtype, hidden_sharding=hidden_sharding(mesh), max_positions=min(longest, config.max_positions)
    )
    tokenizer = load_tokenizer(str(directory), config.vocab_size)
    params = models.load_decoder(str(directory), config, mesh, dtype)
    return config, {**params, "score_head": hf.load_score_head(directory)}, tokenizer


def make_score_rows(
    config: DecoderConfig, params: Params, mesh: jax.sharding.Mesh, make: Callable = heads.make_reward_model
) -> Callable[[Trajectory], np.ndarray]:
    """score_rows(traj) -> float32 [B], or with heads.make_process_reward_model [B T].

    PIECE_TOKENS tokens are on a device at a time. NaN for a row that is longer than the model's context.
    """
    score = jax.jit(make(config))
    sharding = NamedSharding(mesh, PartitionSpec(RULES["rows"]))
    devices = data_parallel_size(mesh)
    fields = ("inputs", "actions", "mask", "positions", "segments")

    def score_rows(traj: Trajectory) -> np.ndarray:
        B, T = traj.mask.shape
        columns = distributed.fetch({name: getattr(traj, name) for name in fields})
        at_once = max(1, PIECE_TOKENS // (T + 1))
        rows = devices * min(at_once, math.ceil(B / devices))
        scores = []
        for start in range(0, B, rows):
            here = np.minimum(np.arange(start, start + rows), B - 1)  # the last piece repeats the last row
            piece = place({name: column[here] for name, column in columns.items()}, sharding)
            scores.append(score(params, {}, Trajectory(logp=jnp.zeros((rows, T)), **piece)))
        found = np.concatenate(distributed.fetch(scores))[:B]
        tokens = np.where(columns["mask"], columns["positions"] + 2, 0).max(axis=1)  # of prompt and completion
        found[tokens > config.max_positions] = np.nan
        return found

    return score_rows


def encode_again(traj: Trajectory, prompts: PromptBatch, tokenizer: Tokenizer, other: Tokenizer) -> Trajectory:
    """Prompts and completions as token ids of the other tokenizer, which encodes them as `data.demonstration` does.

    Where the prompt is a conversation, its own chat template is used. A completion that was cut has no end.
    """
    rows = []
    for text, index in zip(decode_rows(traj, tokenizer.decode), prompt_indices(traj, prompts), strict=True):
        example = demonstration(_as_row(text, prompts.as_read[index]), other)
        example = example if text.ended else without_end(example, other)
        rows.append(example.prompt + example.completion)
    return _rows_of_tokens(rows, padded_width(max(map(len, rows))), other.pad)


def _rows_of_tokens(rows: list[list[int]], width: int, pad: int) -> Trajectory:
    """Rows of token ids as a trajectory whose only decision is the last token."""
    tokens, present = pad_left(rows, width, pad)
    last = np.broadcast_to(np.arange(width) == width - 1, tokens.shape)
    return trajectory_of_tokens(tokens, present.astype(np.int32), last, np.zeros(tokens.shape, np.float32))


def _as_row(text: RowText, row: dict) -> dict:
    """The row that was sampled from, with the completion: a conversation where the prompt is one, else two texts."""
    if not is_conversation(row.get("prompt", row.get("messages"))):
        return {"prompt": text.prompt, "completion": text.completion}
    prompt = prompt_of(row)
    return {"prompt": prompt, "completion": answer(prompt, text.completion), "tools": row.get("tools")}
