"""What `--rewards` names: verifiers, reward models and servers, each with its weight; and rewards of a control."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.common import data, models
from rljax.data.prompts import pad_left
from rljax.data.tokenizer import Tokenizer
from rljax.models import heads, hf
from rljax.models.decoder import DecoderConfig
from rljax.ops.shaping import at_last_decision
from rljax.rewards.pool import Pool
from rljax.rewards.score import ModelReward, Score, decode_rows, make_score
from rljax.train.log import log_info
from rljax.train.mesh import RULES, data_parallel_size
from rljax.types import Params, Trajectory, trajectory_of_tokens

PIECE_TOKENS = 8192  # tokens on a device at a time when a reward model reads a rollout


class Rewards(NamedTuple):
    """The rewards of a run by name, as `--rewards` gives them."""

    verifiers: dict[str, Callable]
    directories: dict[str, Path]  # of reward models
    weights: dict[str, float]  # of all


def read_rewards(items: tuple[str, ...], verifiers: dict[str, Callable]) -> Rewards:
    """The rewards that are named by items NAME or NAME=WEIGHT; a name is one of `verifiers`, or a model directory.

    Raises ValueError for an item that is neither, a weight that is no number, an item named twice, and a directory
    that holds no reward model.
    """
    found = Rewards({}, {}, {})
    for item in items:
        name, weight = _split_weight(item, tuple(verifiers))
        if name in found.weights:
            raise ValueError(f"reward {name!r} is named twice; legal: once, with one weight")
        found.weights[name] = weight
        if name in verifiers:
            found.verifiers[name] = verifiers[name]
        else:
            found.directories[name] = _reward_model_directory(name, item, tuple(verifiers))
    return found


def _split_weight(item: str, names: tuple[str, ...]) -> tuple[str, float]:
    """NAME=WEIGHT as its parts; a weight of 1 where none is given."""
    name, equals, weight = item.rpartition("=")
    if not equals:
        return item, 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(_not_legal(item, names))
    return name, number


def _reward_model_directory(name: str, item: str, names: tuple[str, ...]) -> Path:
    directory = Path(name)
    if not directory.is_dir():
        raise ValueError(_not_legal(item, names))
    hf.read_config(directory, reward_model=True)
    hf.load_score_head(directory)
    return directory


def _not_legal(item: str, names: tuple[str, ...]) -> str:
    return (
        f"reward {item!r}; legal: {', '.join(names)}, or the directory of a reward model; each with =WEIGHT or without"
    )


def load_score(
    rewards: Rewards, tokenizer: Tokenizer, pool: Pool, mesh: jax.sharding.Mesh, dtype: str, model: str
) -> Score:
    """The function that scores a rollout of the policy in directory `model`. Loads the reward models."""
    model_rewards = {
        name: load_reward_model(directory, mesh, tokenizer, model, dtype)
        for name, directory in rewards.directories.items()
    }
    return make_score(rewards.verifiers, tokenizer.decode, rewards.weights, pool, model_rewards)


# -------------------------------------------------------------------------------------------------------- reward models


def load_reward_model(
    directory: str | Path, mesh: jax.sharding.Mesh, tokenizer: Tokenizer, policy: str | Path, dtype: str = "float32"
) -> ModelReward:
    """reward(traj, prompts) -> the score of each completion [B], by the sequence classifier in `directory`.

    A reward model with the vocabulary of the policy (a model directory too) reads the token ids that were sampled. One
    with another vocabulary reads the text, in its own tokens, with its EOS where the completion ended by itself. The
    score is the head's output after the last token. A row that is longer than the model's context is not judged.

    Args:
      tokenizer: of the policy. dtype: in which the model is held and computes.
    Raises ValueError for a directory that holds no reward model.
    """
    config = dataclasses.replace(hf.read_config(directory, reward_model=True), dtype=dtype)
    own = data.load_tokenizer(str(directory), config.vocab_size)
    params = models.load_decoder(str(directory), config, mesh, dtype)
    params["score_head"] = hf.load_score_head(directory)
    score_rows = make_score_rows(config, params, mesh)
    if have_same_vocabulary(directory, policy):
        return lambda traj, prompts: score_rows(traj)
    log_info(f"{directory} has another vocabulary than the policy: it reads prompts and completions as text")
    return lambda traj, prompts: score_rows(encode_again(traj, tokenizer, own))


def have_same_vocabulary(directory: str | Path, other: str | Path) -> bool:
    """Whether every token id means the same to the tokenizers of two model directories."""
    from transformers import AutoTokenizer  # a second of import: only where it is needed

    one, two = (
        AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False).get_vocab()
        for path in (directory, other)
    )
    return one == two


def make_score_rows(
    config: DecoderConfig, params: Params, mesh: jax.sharding.Mesh
) -> Callable[[Trajectory], np.ndarray]:
    """score_rows(traj) -> [B] float32, PIECE_TOKENS tokens on a device at a time.

    NaN for a row that is longer than the model's context.
    """
    score = jax.jit(heads.make_reward_model(config))
    sharding = NamedSharding(mesh, PartitionSpec(RULES["rows"]))
    devices = data_parallel_size(mesh)
    fields = ("inputs", "actions", "mask", "positions", "segments")

    def score_rows(traj: Trajectory) -> np.ndarray:
        B, T = traj.mask.shape
        columns = {name: np.asarray(getattr(traj, name)) for name in fields}
        at_once = max(1, PIECE_TOKENS // (T + 1))
        rows = devices * min(at_once, math.ceil(B / devices))
        scores = []
        for start in range(0, B, rows):
            here = np.minimum(np.arange(start, start + rows), B - 1)  # the last piece repeats the last row
            piece = {name: jax.device_put(column[here], sharding) for name, column in columns.items()}
            scores.append(score(params, {}, Trajectory(logp=jnp.zeros((rows, T)), **piece)))
        found = np.concatenate(jax.device_get(scores))[:B]
        tokens = np.where(columns["mask"], columns["positions"] + 2, 0).max(axis=1)  # of prompt and completion
        return np.where(tokens > config.max_positions, np.nan, found)

    return score_rows


def encode_again(traj: Trajectory, tokenizer: Tokenizer, other: Tokenizer) -> Trajectory:
    """The prompts and completions of the rows, as token ids of the other tokenizer.

    The text of both is encoded as one; a completion that ended by itself gets the other tokenizer's EOS.
    """
    rows = [
        other.encode(row.prompt + row.completion) + list(other.stop[:1]) * row.ended
        for row in decode_rows(traj, tokenizer.decode)
    ]
    longest = max(map(len, rows))
    width = max(16, 1 << (longest - 1).bit_length())  # a power of two: each new width is compiled
    tokens, present = pad_left(rows, width, other.pad)
    last = np.broadcast_to(np.arange(width) == width - 1, tokens.shape)
    return trajectory_of_tokens(tokens, present.astype(np.int32), last, np.zeros(tokens.shape, np.float32))


# ------------------------------------------------------------------------------------------------------------- controls


def control_rewards(traj: Trajectory, kind: str, key) -> Trajectory:
    """Rewards that know nothing of the completions, unless kind is "exact": then those that `traj` has.

    "random": coin flips, 3 in 10 rewarded. "shuffled": each row gets the reward of another row.
    """
    if kind == "exact":
        return traj
    total = jnp.sum(traj.rewards, axis=1)
    if kind == "random":
        other = jax.random.bernoulli(key, 0.3, total.shape).astype(total.dtype)
    else:
        other = jax.random.permutation(key, total)
    return traj.replace(rewards=at_last_decision(other, traj.mask), scores=other[:, None])
