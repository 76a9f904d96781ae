r"""Compiled temporary memory of one GRPO update, in micro-batches, and as the vocabulary grows.

    python experiments/benchmarks/memory.py
    python experiments/benchmarks/memory.py --micro_batches 16 --presets W2

Temporaries are beside the arguments and results of the update, which is compiled and not run. The second table has work
W1 with two vocabularies. What it adds is compared with 4·B·T·ΔV bytes, what float32 logits of all tokens would add:
peers hold one or several such arrays. What grows here is the gradient of the table of embeddings, V·D floats each: the
sum over micro-batches, over chunks, and a chunk's.
"""

import dataclasses
from functools import lru_cache
from typing import Literal

import jax
import optax

from experiments.benchmarks.common import WORKLOADS, Workload, named, run, write_figures
from experiments.benchmarks.train_step import cut_as_recipes, rewarded_rollout
from rljax.algorithms import grpo
from rljax.models import policy
from rljax.train.log import table
from rljax.train.objective import policy_objective
from rljax.train.shared_prefix import share_prefix
from rljax.train.update import make_update
from rljax.types import Batch, TrainState


@dataclasses.dataclass(frozen=True)
class Config:
    """Which sizes to compile."""

    presets: tuple[Literal["W1", "W2"], ...] = ("W1", "W2")  # workloads
    micro_batches: tuple[int, ...] = (1, 4, 8)  # pieces of the update; in each, rows of a group share their prompt
    vocabularies: tuple[int, int] = (4096, 32768)  # the smaller and the larger, of W1 otherwise
    json: str = ""  # where to write the figures


def main(cfg: Config) -> dict[str, float]:
    """Compile, print and return the figures, in MB."""
    lines = []
    for preset in cfg.presets:
        sizes = {f"{m} micro-batches": temporary_bytes(WORKLOADS[preset], m) / 1e6 for m in cfg.micro_batches}
        lines.append({"": preset, **sizes})
    table("temporary memory of an update, MB", lines)
    growth = [vocabulary_growth(cfg.vocabularies, m) for m in cfg.micro_batches]
    table(f"of W1, where 4·B·T·ΔV are {all_logits(cfg.vocabularies) / 1e6:.0f} MB", growth)
    figures = named(lines) | named(growth, "W1, ")
    write_figures(cfg.json, figures)
    return figures


def vocabulary_growth(vocabularies: tuple[int, int], micro_batches: int) -> dict[str, str | float]:
    """What the larger vocabulary adds to the memory of W1."""
    small, large = (temporary_bytes(with_vocabulary(size), micro_batches) for size in vocabularies)
    return {
        "": f"{micro_batches} micro-batches",
        f"V = {vocabularies[0]}, MB": small / 1e6,
        f"V = {vocabularies[1]}, MB": large / 1e6,
        "growth, MB": (large - small) / 1e6,
        "of 4·B·T·ΔV": (large - small) / all_logits(vocabularies),
    }


def with_vocabulary(vocab_size: int) -> Workload:
    workload = WORKLOADS["W1"]
    return workload._replace(config=dataclasses.replace(workload.config, vocab_size=vocab_size))


def all_logits(vocabularies: tuple[int, int]) -> int:
    """Bytes that the logits of all columns of W1 would add."""
    workload = WORKLOADS["W1"]
    columns = workload.prompt_tokens + workload.completion_tokens - 1
    return 4 * workload.rows * columns * (vocabularies[1] - vocabularies[0])


@lru_cache
def batch_of(workload: Workload) -> Batch:
    """A rollout of random parameters."""
    params = policy.init(workload.config, jax.random.key(0))
    return grpo().credit(rewarded_rollout(workload, params), {})


def temporary_bytes(workload: Workload, micro_batches: int) -> int:
    """Of the compiled update on a rollout, beside its arguments and results."""
    config = workload.config
    optimizer = optax.adamw(1e-3)
    pieces = cut_as_recipes("grpo", workload, micro_batches)
    batch = share_prefix(batch_of(workload), workload.prompt_tokens - 1, pieces.group_size)

    def state():
        params = policy.init(config, jax.random.key(0))
        return TrainState(None, params, optimizer.init(params), jax.random.key(0), None, None)

    update = make_update(policy_objective(policy.make_policy(config), grpo()), optimizer, micro_batches)
    compiled = update.jitted.lower(jax.eval_shape(state), {}, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    run(Config, main)
