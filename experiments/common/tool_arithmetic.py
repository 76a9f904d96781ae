"""Products that a small decoder cannot compute in its head, a calculator for it to call, and demonstrations of both."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.common.arithmetic import small_decoder
from experiments.common.conversations import (
    ConversationSettings,
    TurnCodec,
    environment_prompts,
    make_codec,
    make_converse,
)
from rljax.data.examples import Example
from rljax.data.prompts import Prompts
from rljax.data.tokenizer import Tokenizer, character_tokenizer
from rljax.data.tool_calls import parse_plain
from rljax.envs.calculator import calculator
from rljax.envs.text import TextEnv, TurnLimits
from rljax.envs.tools import tool_env
from rljax.models.decoder import DecoderConfig, language_model
from rljax.rewards.text import exact_text
from rljax.types import Params, PromptBatch, Sampling, TrainState

ALPHABET = "".join(map(chr, range(32, 127)))  # errors of a call are written in it too
TURN_TOKENS = 16
MAX_TURNS = 2  # a call, and the answer
MAX_TOKENS = TURN_TOKENS * MAX_TURNS  # that can be sampled in a conversation
MAX_CONTEXT = 40


class ToolTask(NamedTuple):
    """Problems to train on and to evaluate on, which share none, the environment, and the model that is to learn."""

    env: TextEnv
    tokenizer: Tokenizer
    codec: TurnCodec
    limits: TurnLimits
    train_prompts: Prompts
    eval_prompts: Prompts
    config: DecoderConfig


def product_environment() -> TextEnv:
    """347*58= may be answered at once, or after <calc(347*58)>, which the environment answers with 20126=."""

    def calc(expression: str) -> str:
        return f"{calculator(expression)}="

    def grade(answer: str, row: dict) -> float:
        return exact_text(answer, row["answer"])

    parse = partial(parse_plain, start="<", end=">")
    return tool_env("products", {"calc": calc}, parse, lambda row: row["prompt"], grade)


def products(count: int, seed: int) -> list[dict]:
    """That many different products of a number of three digits and one of two, as {"prompt", "answer"}."""
    numbers = np.random.default_rng([3, seed]).choice(900 * 90, count, replace=False)
    pairs = [(100 + number // 90, 10 + number % 90) for number in numbers.tolist()]
    return [{"prompt": f"{a}*{b}=", "answer": str(a * b)} for a, b in pairs]


def make_tool_task(
    eval_prompts: int, seed: int, width: int = 128, layers: int = 4, mesh: Mesh | None = None
) -> ToolTask:
    """The task, and a decoder of this width and depth."""
    env = product_environment()
    limits = TurnLimits(timeout_seconds=5.0)
    tokenizer = character_tokenizer(ALPHABET)
    codec = make_codec(tokenizer)
    rows = products(16384 + eval_prompts, seed)
    evaluation, train = (
        environment_prompts(env, side, codec, MAX_CONTEXT, seed, limits)
        for side in (rows[:eval_prompts], rows[eval_prompts:])
    )
    config = small_decoder(tokenizer, width, layers, MAX_CONTEXT, mesh)
    return ToolTask(env, tokenizer, codec, limits, train, evaluation, config)


def conversation_settings(task: ToolTask, n: int, seed: int) -> ConversationSettings:
    """How to sample n conversations per prompt."""
    sampling = Sampling(n=n, max_tokens=TURN_TOKENS, stop=task.tokenizer.stop)
    return ConversationSettings(task.env, task.codec, task.limits, sampling, seed, MAX_TURNS, MAX_CONTEXT)


def mean_reward(task: ToolTask, params: Params, rows: PromptBatch, seed: int) -> dict[str, float]:
    """Mean `reward` of one conversation for each prompt, its standard `error`, and `tool_calls` a conversation.

    Conversations are sampled at temperature 1, with keys that no training step uses and the calculator's own answers.
    """
    converse = make_converse(language_model(task.config), conversation_settings(task, 1, seed))
    state = TrainState(0, params, None, jax.random.key(0))
    traj, _, metrics = converse(state, rows, step=-1)
    found = np.asarray(traj.scores[:, 0])
    error = found.std() / len(found) ** 0.5
    return {"reward": found.mean(), "error": error, "tool_calls": metrics.get("conversation/tool_calls", 0.0)}


def demonstrations_of_tools(task: ToolTask, rows: Sequence[dict], with_tool: np.ndarray) -> list[Example]:
    """Right answers, after a call of the calculator where `with_tool` [P] says so. What it returned is not learned."""
    stop = list(task.tokenizer.stop[:1])
    examples = []
    for row, calls in zip(rows, with_tool, strict=True):
        prompt, answer = row["prompt"], row["answer"]
        turns = [(f"<calc({prompt[:-1]})>", True), (f"{answer}=", False)] if calls else []
        ids: list[int] = []
        mask: list[bool] = []
        for text, is_chosen in [*turns, (answer, True)]:
            new = task.tokenizer.encode(text) + (stop if is_chosen else [])
            ids += new
            mask += [is_chosen] * len(new)
        examples.append(Example(task.tokenizer.encode(prompt), ids, mask, row))
    return examples
