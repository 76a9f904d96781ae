r"""Conversations with a kept cache against reading all of them again before each turn, alternately in one process.

    python experiments/benchmarks/conversations.py
    python experiments/benchmarks/conversations.py --turns 2 4 8 16 --observation_tokens 128 --json conversations.json

The model is W1 of rollout.py (vocabulary 4096, width 256, 4 layers). Nothing ends a turn early, and the environment
answers at once with random tokens: what differs is what is read. The ratio is of medians, re-prefill over kept.
"""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np

from experiments.benchmarks.common import WORKLOADS, Output, alternately, prompts, run, trace, write_figures
from rljax.models import decoder, policy
from rljax.rollouts.conversations import sample_conversations
from rljax.train.log import log_info, table
from rljax.types import Observation, Sampling, Turn


@dataclasses.dataclass(frozen=True)
class Config(Output):
    """What to measure."""

    turns: tuple[int, ...] = (2, 4, 8)  # of each conversation
    turn_tokens: int = 32  # that the policy writes in a turn
    observation_tokens: int = 32  # that the environment adds after it
    repeats: int = 5  # timed runs of each


def conversations(cfg: Config, turns: int, cache: Literal["kept", "prefill"]) -> Callable[[int], object]:
    """work(i): the rollout of step i."""
    workload = WORKLOADS["W1"]
    config = workload.config
    params = policy.init(config, jax.random.key(0))
    lm = decoder.language_model(config, devices=1)
    rows = prompts(config, workload.prompts, workload.prompt_tokens)
    sampling = Sampling(n=workload.n, max_tokens=cfg.turn_tokens)
    reply = np.random.default_rng(1).integers(1, config.vocab_size, cfg.observation_tokens).tolist()

    def respond(complete: list[Turn]) -> list[Observation]:
        return [Observation(reply, 0.0) for _ in complete]

    settings = {
        "max_turns": turns,
        "max_context": workload.prompt_tokens + turns * (cfg.turn_tokens + cfg.observation_tokens),
        "cache": cache,
    }
    return lambda i: sample_conversations(lm, params, {}, rows, respond, sampling, 0, i, **settings)[0]


def main(cfg: Config) -> dict[str, float]:
    """Measure, print and return the figures."""
    figures = {}
    rows = []
    for turns in cfg.turns:
        log_info(f"{turns} turns: {cfg.repeats + 1} rollouts with either cache")
        works = {cache: conversations(cfg, turns, cache) for cache in ("kept", "prefill")}
        times = alternately(works, cfg.repeats)
        trace({f"{turns} turns {name}": work for name, work in works.items()}, cfg.profile)
        median = {name: statistics.median(seconds) for name, seconds in times.items()}
        ratio = median["prefill"] / median["kept"]
        rows.append({"turns": turns, "kept, s": median["kept"], "re-prefill, s": median["prefill"], "ratio": ratio})
        figures |= {f"{turns} turns, {name}, seconds": value for name, value in median.items()}
        figures[f"{turns} turns, re-prefill / kept"] = ratio
    log_info(f"W1 on {jax.devices()[0].device_kind}, medians of {cfg.repeats}")
    table("seconds", rows)
    write_figures(cfg.json, figures)
    return figures


if __name__ == "__main__":
    run(Config, main)
