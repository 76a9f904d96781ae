"""Problems that a laptop's CPU can learn, and a decoder of characters to learn them: additions, or sorting digits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jax.sharding import Mesh

from experiments.common import models
from rljax.data.prompts import Prompts
from rljax.data.tasks import addition_problems, sorting_problems, train_eval_split_by_kind
from rljax.data.tokenizer import Tokenizer, character_tokenizer, save_characters
from rljax.models import decoder, hf, policy
from rljax.models.decoder import DecoderConfig
from rljax.rewards.score import make_score
from rljax.rewards.text import exact_text
from rljax.rollouts.sampler import sample
from rljax.train.log import write_atomically
from rljax.train.mesh import hidden_sharding
from rljax.train.metrics import reward_and_kl
from rljax.types import LM, Params, PromptBatch, Sampling, TrainState, Trajectory

ALPHABET = "0123456789+="
PROBLEMS = {"additions": addition_problems, "sortings": sorting_problems}
Problems = Literal[tuple(PROBLEMS)]


class Task(NamedTuple):
    """Problems to train on and to evaluate on, which share none, and the model that is to solve them."""

    tokenizer: Tokenizer
    train_prompts: Prompts
    eval_prompts: Prompts
    max_tokens: int  # tokens of the longest answer, its end included
    config: DecoderConfig
    lm: LM
    policy: Callable


def make_task(
    name: Problems, eval_prompts: int, seed: int, width: int = 128, layers: int = 4, mesh: Mesh | None = None
) -> Task:
    """The problems of this name, `eval_prompts` of them held out, and a decoder of this width and depth."""
    problems = PROBLEMS[name]()
    train_side, eval_side = train_eval_split_by_kind(problems, eval_prompts, seed)
    tokenizer = character_tokenizer(ALPHABET)
    prompt_tokens = max(len(problem["prompt"]) for problem in problems)
    max_tokens = 1 + max(len(problem["answer"]) for problem in problems)

    def prompts(side: list[dict]) -> Prompts:
        return Prompts(side, [tokenizer.encode(row["prompt"]) for row in side], prompt_tokens, seed)

    config = small_decoder(tokenizer, width, layers, prompt_tokens + max_tokens, mesh)
    lm = decoder.language_model(config)
    return Task(tokenizer, prompts(train_side), prompts(eval_side), max_tokens, config, lm, policy.make_policy(config))


def small_decoder(tokenizer: Tokenizer, width: int, layers: int, positions: int, mesh: Mesh | None) -> DecoderConfig:
    """A decoder of four heads over the tokenizer's characters."""
    return DecoderConfig(
        tokenizer.size,
        width,
        layers,
        num_heads=4,
        num_kv_heads=4,
        head_dim=width // 4,
        intermediate_size=11 * width // 4,
        max_positions=positions,
        hidden_sharding=None if mesh is None else hidden_sharding(mesh),
    )


def answer_tokens(task: Task, rows: PromptBatch) -> list[list[int]]:
    """The right answer to each prompt, as tokens that end with a stop."""
    stop = task.tokenizer.stop[0]
    return [[*task.tokenizer.encode(row["answer"]), stop] for row in rows.columns]


def sampling_of(task: Task, n: int = 1, temperature: float = 1.0) -> Sampling:
    """How to sample n completions per prompt."""
    return Sampling(temperature, n=n, max_tokens=task.max_tokens, stop=task.tokenizer.stop)


def sample_scored(task: Task, params: Params, rows: PromptBatch, seed: int) -> Trajectory:
    """One scored completion to each prompt, sampled at temperature 1 with keys that no training step uses."""
    traj = sample(task.lm, params, {}, rows, sampling_of(task), seed, step=-1)
    score = make_score({"exact": exact_text}, task.tokenizer.decode)
    return score(traj, rows)


def accuracy(task: Task, params: Params, rows: PromptBatch, seed: int) -> float:
    """Share of the prompts answered rightly."""
    return float(np.mean(sample_scored(task, params, rows, seed).scores))


def make_evaluate(task: Task, count: int, seed: int) -> Callable[[TrainState], dict[str, float]]:
    """evaluate(state) -> reward, and KL to the reference, on the first `count` problems never trained on."""
    annotate = policy.make_annotate(task.policy, ("ref_logp",))
    rows = task.eval_prompts.first(count)

    def evaluate(state: TrainState) -> dict[str, float]:
        traj = sample_scored(task, state.params, rows, seed)
        found = reward_and_kl(annotate(state, traj))
        return {"eval_reward": found["reward"], "kl_sequence": found["kl"]}

    return evaluate


def save_model_files(tokenizer: Tokenizer, config: DecoderConfig, directory: Path, alphabet: str = ALPHABET) -> None:
    """Tokenizer and config.json, which tools/export.py needs beside the checkpoints."""
    save_characters(alphabet, directory)
    write_atomically(directory / "config.json", json.dumps(hf.to_hf_config(config, tokenizer.stop)))


def save_pretrained(config: DecoderConfig, params: Params, directory: Path) -> None:
    """The trained decoder as DIRECTORY/model, beside its model_files."""
    models.save_pretrained(params, {}, config, directory / "model_files", directory / "model")
