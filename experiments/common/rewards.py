"""What `--rewards` names: verifiers, reward models and servers, each with its weight; and rewards of a control."""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.common import data, models, settings
from experiments.common.rows import unescape
from rljax.data.examples import demonstration
from rljax.data.formats import is_conversation, messages_of
from rljax.data.prompts import pad_left
from rljax.data.tokenizer import Tokenizer
from rljax.models import heads, hf
from rljax.models.decoder import DecoderConfig
from rljax.ops.ranking import min_over_steps
from rljax.ops.shaping import at_last_decision
from rljax.rewards.judge import RUBRICS, Endpoint, check_rubric, make_judge, served_model
from rljax.rewards.pool import Pool
from rljax.rewards.remote import make_remote_reward
from rljax.rewards.score import ModelReward, RowText, Score, StepScores, decode_rows, make_score, prompt_indices
from rljax.rewards.server import AnswerCache, Limits, check_reachable, check_url
from rljax.rewards.steps import mark_step_ends
from rljax.train.log import log_info
from rljax.train.mesh import RULES, data_parallel_size
from rljax.types import Params, PromptBatch, Trajectory, trajectory_of_tokens

PIECE_TOKENS = 8192  # tokens on a device at a time when a reward model reads a rollout


class Rewards(NamedTuple):
    """The rewards of a run by name, as `--rewards` gives them."""

    verifiers: dict[str, Callable]
    directories: dict[str, Path]  # of reward models
    servers: dict[str, Callable[[Tokenizer, AnswerCache], ModelReward]]  # what makes the reward of a judge or server
    weights: dict[str, float]  # of all
    conditions: dict[str, str]  # name -> the reward that must be above 0 for it to count
    process: set[str]  # which of `directories` judge steps
    per_step: bool  # a step is rewarded where it ends; False: the least of a completion's steps, at its end
    options: settings.Reward


def read_rewards(
    items: tuple[str, ...], verifiers: dict[str, Callable], options: settings.Reward, per_step: bool = False
) -> Rewards:
    """The rewards that are named by items NAME, NAME=WEIGHT, NAME@OTHER or NAME=WEIGHT@OTHER.

    A name is one of `verifiers`, the directory of a reward model, process:DIRECTORY for one that judges steps,
    judge:URL or remote:URL. With @OTHER, which is named before, it counts where the other is above 0. Raises ValueError
    for an item that is none of these, a weight that is no number, an item named twice, a directory that holds no reward
    model, a rubric that cannot be filled in, and a server that does not answer.

    per_step: each step is rewarded where it ends. Raises ValueError where nothing judges steps.
    """
    found = Rewards({}, {}, {}, {}, {}, set(), per_step, options)
    for item in items:
        plain, _, condition = item.rpartition("@")
        is_conditioned = condition in found.weights
        name, weight = _split_weight(plain if is_conditioned else item, tuple(verifiers))
        if name in found.weights:
            raise ValueError(f"reward {name!r} is named twice; legal: once, with one weight")
        _add_reward(found, name, item, verifiers, options)
        found.weights[name] = weight
        if is_conditioned:
            found.conditions[name] = condition
    if per_step and not found.process:
        raise ValueError("this algorithm learns from steps, and no reward judges them; legal: process:DIRECTORY")
    return found


def _add_reward(found: Rewards, name: str, item: str, verifiers: dict[str, Callable], options: settings.Reward) -> None:
    """Puts the reward where `found` has those of its kind. Raises ValueError where it is of none."""
    kind, _, place = name.partition(":")
    if name in verifiers:
        found.verifiers[name] = verifiers[name]
    elif kind in SERVERS and place:
        check_url(place)
        found.servers[name] = SERVERS[kind](place, options)
    elif Path(place if kind == "process" else name).is_dir():
        directory = Path(place if kind == "process" else name)
        hf.read_config(directory, reward_model=True)
        hf.load_score_head(directory)
        found.directories[name] = directory
        if kind == "process":
            found.process.add(name)
    else:
        raise ValueError(_not_legal(item, tuple(verifiers)))


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


def _not_legal(item: str, names: tuple[str, ...]) -> str:
    return (
        f"reward {item!r}; legal: {', '.join(names)}, the directory of a reward model, process:DIRECTORY, judge:URL or "
        "remote:URL; each with =WEIGHT or without (with one where the name holds a =), and with @NAME of one before it "
        "to count where that is above 0"
    )


def load_score(
    rewards: Rewards,
    tokenizer: Tokenizer,
    pool: Pool,
    mesh: jax.sharding.Mesh,
    dtype: str,
    model: str,
    directory: Path,
) -> Score:
    """The function that scores a rollout of the policy in the directory `model`. Loads the reward models.

    directory: of the run, which keeps the answers of servers.
    """
    model_rewards = {}
    for name, place in rewards.directories.items():
        if name in rewards.process:
            model_rewards[name] = load_process_reward_model(place, mesh, tokenizer, model, rewards, dtype)
        else:
            model_rewards[name] = load_reward_model(place, mesh, tokenizer, model, dtype)
    for number, (name, make) in enumerate(rewards.servers.items()):
        model_rewards[name] = make(tokenizer, AnswerCache(directory / "answers" / f"{number}.jsonl"))
    return make_score(
        rewards.verifiers,
        tokenizer.decode,
        rewards.weights,
        pool,
        model_rewards,
        rewards.conditions,
        rewards.options.max_failed,
        report=log_info,
    )


# -------------------------------------------------------------------------------------------------------------- servers


def _remote(url: str, options: settings.Reward) -> Callable[[Tokenizer, AnswerCache], ModelReward]:
    limits = _limits(options)
    check_reachable(url)

    def make(tokenizer: Tokenizer, cache: AnswerCache) -> ModelReward:
        return make_remote_reward(url, tokenizer.decode_all, limits, cache)

    return make


def _judge(url: str, options: settings.Reward) -> Callable[[Tokenizer, AnswerCache], ModelReward]:
    """OPENAI_API_KEY of the environment goes to the server, where it is set."""
    rubric = Path(options.rubric).read_text(encoding="utf-8") if options.rubric else RUBRICS[options.compare]
    check_rubric(rubric, options.compare)
    limits = _limits(options)
    check_reachable(url)
    key = os.environ.get("OPENAI_API_KEY")
    endpoint = Endpoint(url, options.judge_model or served_model(url, key), options.judge_tokens, key)

    def make(tokenizer: Tokenizer, cache: AnswerCache) -> ModelReward:
        return make_judge(endpoint, tokenizer.decode, options.compare, rubric, options.scale, limits, cache)

    return make


SERVERS = {"judge": _judge, "remote": _remote}


def _limits(options: settings.Reward) -> Limits:
    if min(options.server_timeout_seconds, options.server_step_seconds, options.server_requests) <= 0:
        raise ValueError("reward.server_timeout_seconds, server_step_seconds and server_requests; legal: above 0")
    return Limits(
        timeout_seconds=options.server_timeout_seconds,
        step_timeout_seconds=options.server_step_seconds,
        max_concurrent=options.server_requests,
        retries=options.server_retries,
    )


# -------------------------------------------------------------------------------------------------------- reward models


def load_reward_model(
    directory: str | Path, mesh: jax.sharding.Mesh, tokenizer: Tokenizer, policy: str | Path, dtype: str = "float32"
) -> ModelReward:
    """reward(traj, prompts) -> the score of each completion [B], by the sequence classifier in `directory`.

    A reward model with the vocabulary of the policy (a model directory too) reads the token ids that were sampled. One
    with another vocabulary reads the text, in its own tokens and chat template. The
    score is the head's output after the last token. A row that is longer than the model's context is not judged.

    Args:
      tokenizer: of the policy. dtype: in which the model is held and computes.
    Raises ValueError for a directory that holds no reward model.
    """
    config, params, own = _load_scorer(directory, mesh, dtype)
    score_rows = make_score_rows(config, params, mesh)
    if have_same_vocabulary(directory, policy):
        return lambda traj, prompts: score_rows(traj)
    log_info(f"{directory} has another vocabulary than the policy: it reads prompts and completions as text")
    return lambda traj, prompts: score_rows(encode_again(traj, prompts, tokenizer, own))


def load_process_reward_model(
    directory: str | Path,
    mesh: jax.sharding.Mesh,
    tokenizer: Tokenizer,
    policy: str | Path,
    rewards: Rewards,
    dtype: str = "float32",
) -> ModelReward:
    """reward(traj, prompts) -> the probability that a step is right, σ(head's output), behind its last token.

    With `rewards.per_step` that of each step, else [B]: the least of a completion's steps. Raises ValueError for a
    model with another vocabulary than the policy's.
    """
    if not have_same_vocabulary(directory, policy):
        raise ValueError(f"{directory} judges steps, and its vocabulary is not that of {policy}; legal: the same")
    config, params, _ = _load_scorer(directory, mesh, dtype)
    score_tokens = make_score_rows(config, params, mesh, heads.make_process_reward_model)
    token_bytes = data.token_bytes(tokenizer, config.vocab_size)
    separator = unescape(rewards.options.step_separator)

    def reward(traj: Trajectory, prompts: PromptBatch) -> StepScores | np.ndarray:
        ends = mark_step_ends(traj, token_bytes, separator)
        probability = jax.nn.sigmoid(score_tokens(traj))
        return StepScores(probability, ends) if rewards.per_step else min_over_steps(probability, jnp.asarray(ends))

    return reward


def _load_scorer(directory: str | Path, mesh: jax.sharding.Mesh, dtype: str) -> tuple[DecoderConfig, Params, Tokenizer]:
    """Config, parameters and tokenizer of a sequence classifier."""
    config = dataclasses.replace(hf.read_config(directory, reward_model=True), dtype=dtype)
    tokenizer = data.load_tokenizer(str(directory), config.vocab_size)
    params = models.load_decoder(str(directory), config, mesh, dtype)
    return config, {**params, "score_head": hf.load_score_head(directory)}, tokenizer


def have_same_vocabulary(directory: str | Path, other: str | Path) -> bool:
    """Whether every token id means the same to the tokenizers of two model directories."""
    from transformers import AutoTokenizer  # a second of import: only where it is needed

    one, two = (
        AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False).get_vocab()
        for path in (directory, other)
    )
    return one == two


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
        found[tokens > config.max_positions] = np.nan
        return found

    return score_rows


def encode_again(traj: Trajectory, prompts: PromptBatch, tokenizer: Tokenizer, other: Tokenizer) -> Trajectory:
    """Prompts and completions as token ids of the other tokenizer, which encodes them as `data.demonstration` does.

    Where the prompt is a conversation, its own chat template is used. A completion that was cut has no end.
    """
    rows = []
    for text, index in zip(decode_rows(traj, tokenizer.decode), prompt_indices(traj, prompts), strict=True):
        example = demonstration(_as_row(text, prompts.columns[index]), other)
        cut = not text.ended and example.completion[-1] in other.stop
        rows.append(example.prompt + (example.completion[:-1] if cut else example.completion))
    longest = max(map(len, rows))
    width = max(16, 1 << (longest - 1).bit_length())  # a power of two: each new width is compiled
    tokens, present = pad_left(rows, width, other.pad)
    last = np.broadcast_to(np.arange(width) == width - 1, tokens.shape)
    return trajectory_of_tokens(tokens, present.astype(np.int32), last, np.zeros(tokens.shape, np.float32))


def _as_row(text: RowText, columns: dict) -> dict:
    """A row as `data.formats` has them: a conversation where the prompt is one, else two texts."""
    column = "prompt" if "prompt" in columns else "messages"
    if not is_conversation(columns.get(column)):
        return {"prompt": text.prompt, "completion": text.completion}
    messages = messages_of(columns, column)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    answer = [{"role": "assistant", "content": text.completion}]
    return {"prompt": messages, "completion": answer, "tools": columns.get("tools")}


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
