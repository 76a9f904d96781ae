"""What `--rewards` names: verifiers, reward models and servers, each with its weight; and rewards of a control."""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.common import settings
from experiments.common.difficulty import is_filtered
from experiments.common.hub import find_model, model_of_reward, split_reward
from experiments.common.reward_models import load_process_reward_model, load_reward_model
from experiments.common.rows import unescape
from experiments.common.verifiers import read_rubric, with_sandbox
from rljax.data.tokenizer import Tokenizer
from rljax.models import hf
from rljax.ops.shaping import at_last_decision
from rljax.rewards.judge import Endpoint, check_rubric, make_judge, served_model
from rljax.rewards.pool import Pool
from rljax.rewards.remote import make_remote_reward
from rljax.rewards.score import Hosts, ModelReward, Score, make_score
from rljax.rewards.server import AnswerCache, Limits, check_reachable, check_url
from rljax.train import distributed
from rljax.train.log import log_info
from rljax.types import Algorithm, Trajectory


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
        name, weight, condition = split_reward(item, found.weights)
        number = _read_weight(weight, name, item, tuple(verifiers))
        if name in found.weights:
            raise ValueError(f"reward {name!r} is named twice; legal: once, with one weight")
        _add_reward(found, name, item, verifiers, options)
        found.weights[name] = number
        if condition is not None:
            found.conditions[name] = condition
    if per_step and not found.process:
        raise ValueError("this algorithm learns from steps, and no reward judges them; legal: process:DIRECTORY")
    return found


def check_compared(cfg: Any, sizes: Mapping[str, int], alone: str = "") -> None:
    """Raise ValueError where a judge is to compare the completions of a prompt, and one has nothing beside it.

    Args:
      sizes: setting -> completions of a prompt that are judged together.
      alone: which other completion is judged by itself, and what is legal.
    """
    if cfg.reward.compare == "score" or not any(item.startswith("judge:") for item in cfg.rewards):
        return
    text = "{} = {} leaves nothing to compare; legal: at least 2"
    small = [text.format(name, size) for name, size in sizes.items() if size < 2]
    if found := [*small, *filter(None, [alone])]:
        raise ValueError(f"reward.compare = {cfg.reward.compare} compares the completions of a prompt: {found[0]}")


def check_compared_in_training(cfg: Any, needs: Sequence[str] = ()) -> None:
    """`check_compared` of the steps and evaluations of a script that trains. needs: of its algorithm."""
    in_evaluation = -(-cfg.eval_samples // max(cfg.eval_prompts, 1))
    sizes = {"num_generations": cfg.batches.num_generations, "eval_samples/eval_prompts": in_evaluation}
    check_compared(cfg, sizes, "the greedy one stands alone; legal: another algorithm" * ("baseline" in needs))


def check_verdicts(rewards: Rewards, algorithm: Algorithm, data: settings.PromptData) -> None:
    """Raise ValueError where algorithm or pass rates ask which completions are correct, and only a model's score tells.

    The first column of the scores tells (`rljax.ops.returns.correct_episodes`): verifiers stand before models and
    servers. What a server of rewards answers is taken for a verdict.
    """
    first = next(iter((*rewards.verifiers, *rewards.directories, *rewards.servers)))
    is_score = first in rewards.directories or first.startswith("judge:")
    if is_score and (algorithm.reads == "correct" or is_filtered(data)):
        asks = "this algorithm" if algorithm.reads == "correct" else "a pass rate"
        raise ValueError(
            f"{asks} asks which completions are correct, and the score of {first} does not say; legal: a verifier in "
            "--rewards, with =0 if it is not to be rewarded"
        )


def _add_reward(found: Rewards, name: str, item: str, verifiers: dict[str, Callable], options: settings.Reward) -> None:
    """Puts the reward where `found` has those of its kind. Raises ValueError where it is of none."""
    kind, _, place = name.partition(":")
    if name in verifiers:
        found.verifiers[name] = with_sandbox(verifiers[name], options)
    elif kind in SERVERS and place:
        check_url(place)
        found.servers[name] = SERVERS[kind](place, options)
    else:
        directory = find_model(model_of_reward(name))
        if not (directory and Path(directory).is_dir()):
            raise ValueError(_not_legal(item, tuple(verifiers)))
        hf.read_config(directory, reward_model=True)
        hf.load_score_head(directory)
        _check_kind(directory, kind == "process")
        found.directories[name] = Path(directory)
        if kind == "process":
            found.process.add(name)


def _check_kind(directory: str | Path, as_process: bool) -> None:
    """Raise ValueError where a reward model is named as one of the other kind."""
    kind = hf.reward_kind(directory)
    if kind == "process" and not as_process:
        raise ValueError(f"{directory} is a process reward model: it judges steps; legal: process:{directory}")
    if kind == "outcome" and as_process:
        raise ValueError(f"{directory} is an outcome reward model: it judges whole completions; legal: {directory}")


def _read_weight(text: str | None, name: str, item: str, names: tuple[str, ...]) -> float:
    """A weight as a number; 1 where none is given.

    Raises ValueError where it is none, and for a ?KEY=NUMBER at the end, which may be one of the address.
    """
    if text is None:
        return 1.0
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    is_of_the_query = "?" in name and "=" not in re.split("[?&]", name)[-1]
    if is_of_the_query or not math.isfinite(number):
        raise ValueError(_not_legal(item, names))
    return number


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
    directory: Path,
) -> Score:
    """The function that scores a rollout of the policy, whose tokenizer this is. Loads the reward models.

    directory: of the run, which keeps the answers of servers.
    """
    model_rewards = {}
    for name, place in rewards.directories.items():
        if name in rewards.process:
            model_rewards[name] = load_process_reward_model(
                place, mesh, tokenizer, unescape(rewards.options.step_separator), rewards.per_step, dtype
            )
        else:
            model_rewards[name] = load_reward_model(place, mesh, tokenizer, dtype)
    process = f"-process{distributed.process_index()}" * (not distributed.is_main())
    servers = {
        name: make(tokenizer, AnswerCache(directory / "answers" / f"{number}{process}.jsonl"))
        for number, (name, make) in enumerate(rewards.servers.items())
    }
    return make_score(
        rewards.verifiers,
        tokenizer.decode,
        rewards.weights,
        pool,
        model_rewards,
        rewards.conditions,
        rewards.options.max_failed,
        report=log_info,
        hosts=Hosts(distributed.fetch, distributed.share_rows),
        servers=servers,
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
    rubric = read_rubric(options)
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
    positive = ("server_timeout_seconds", "server_step_seconds", "server_requests", "scale", "judge_tokens")
    wrong = [name for name in positive if not getattr(options, name) > 0]
    if wrong:
        raise ValueError(f"reward.{wrong[0]} = {getattr(options, wrong[0])}; legal: above 0")
    return Limits(
        timeout_seconds=options.server_timeout_seconds,
        step_timeout_seconds=options.server_step_seconds,
        max_concurrent=options.server_requests,
        retries=options.server_retries,
    )


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
