r"""How the seconds of a rollout and of a GRPO update as recipes make it grow with the size of the work: exponents.

    python experiments/benchmarks/cost.py

From a small work (BASE below) one size at a time grows; seconds ~ size^exponent is fitted by least squares of the
logarithms of the best runs. An exponent of 1 is proportional; below it something is shared or does not depend on the
size. `ideal` is the same fit to the useful FLOPs (roofline.py). Devices are virtual ones of a CPU, a process for each
number: ideally the seconds fall with them up to the number of cores.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from math import log
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from experiments.benchmarks.common import Output, Workload, alternately, named, prompts, run, trace, write_figures
from experiments.benchmarks.roofline import Work, rollout_works, update_works
from experiments.benchmarks.train_step import rewarded_rollout
from experiments.common import train
from experiments.common.settings import Batches
from rljax.algorithms import grpo
from rljax.models import decoder, policy
from rljax.rollouts.sampler import sample
from rljax.train import mesh as meshes
from rljax.train.log import table
from rljax.train.objective import policy_objective
from rljax.train.update import make_update
from rljax.types import Sampling, TrainState

BASE = Workload(decoder.DecoderConfig(2048, 128, 2, 4, 2, 32, 344), 4, 4, 32, 16)


def of_model(**changes: int) -> Workload:
    return BASE._replace(config=dataclasses.replace(BASE.config, **changes))


SIZES: dict[str, Callable[[int], Workload]] = {  # by how much it grows -> the work
    "completion tokens": lambda times: BASE._replace(completion_tokens=times * BASE.completion_tokens),
    "group size": lambda times: BASE._replace(n=times * BASE.n),
    "prompt length": lambda times: BASE._replace(prompt_tokens=times * BASE.prompt_tokens),
    "vocabulary": lambda times: of_model(vocab_size=times * BASE.config.vocab_size),
    "layers": lambda times: of_model(num_layers=times * BASE.config.num_layers),
}
DEVICES = "devices"  # the work stays as it is


@dataclasses.dataclass(frozen=True)
class Config(Output):
    """What to measure."""

    sizes: tuple[str, ...] = (*SIZES, DEVICES)  # what grows
    factors: tuple[int, ...] = (1, 4)  # by how much
    device_factors: tuple[int, ...] = (1, 2)  # numbers of devices
    repeats: int = 7  # timed runs of each
    only_devices: int = 0  # print the seconds of the base work on so many virtual devices as JSON, and end


def main(cfg: Config) -> dict[str, float]:
    """Measure, print and return the exponents."""
    if cfg.only_devices:
        jax.config.update("jax_num_cpu_devices", cfg.only_devices)
        print(json.dumps(best_seconds(BASE, cfg.repeats)))
        return {}
    lines = []
    for size in cfg.sizes:
        factors = cfg.device_factors if size == DEVICES else cfg.factors
        measured = [seconds_at(size, factor, cfg) for factor in factors]
        for name in ("rollout", "update"):
            seconds = [found[name] for found in measured]
            steps = {f"x {factor}, ms": 1e3 * value for factor, value in zip(factors, seconds, strict=True)}
            fits = {"exponent": exponent(factors, seconds), "ideal": ideal(size, name, factors)}
            lines.append({"": f"{name}, {size}", **fits, **steps})
    table("seconds ~ size^exponent", lines)
    trace(works_of(BASE), cfg.profile)
    figures = named(lines)
    write_figures(cfg.json, figures)
    return figures


def seconds_at(size: str, factor: int, cfg: Config) -> dict[str, float]:
    """Seconds of rollout and update where `size` has grown by this factor."""
    if size != DEVICES:
        return best_seconds(SIZES[size](factor), cfg.repeats)
    command = [sys.executable, str(Path(__file__)), "--only_devices", str(factor), "--repeats", str(cfg.repeats)]
    on_cpu = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=on_cpu, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@lru_cache
def best_seconds(workload: Workload, repeats: int) -> dict[str, float]:
    return {name: min(seconds) for name, seconds in alternately(works_of(workload), repeats).items()}


def ideal(size: str, name: str, factors: Iterable[int]) -> float:
    """The exponent of the useful FLOPs; with more devices, that of the work of one of them, while cores last."""
    if size == DEVICES:
        return exponent(factors, [1 / min(factor, os.cpu_count()) for factor in factors])
    works = {"rollout": rollout_works, "update": update_works}[name]
    return exponent(factors, [flops_of(works(SIZES[size](factor), SIZES[size](factor).config)) for factor in factors])


def flops_of(works: Iterable[Work]) -> int:
    return sum(work.attention_flops + sum(matmul.flops for matmul in work.matmuls) for work in works)


def exponent(sizes: Iterable[float], values: Iterable[float]) -> float:
    """The slope of log value over log size."""
    return statistics.linear_regression([log(size) for size in sizes], [log(value) for value in values]).slope


def works_of(workload: Workload) -> dict[str, Callable[[int], object]]:
    """work(i) of a rollout and of an update, with rows spread over all devices."""
    config = workload.config
    lm = decoder.language_model(config)
    optimizer = optax.adamw(1e-4)
    params = policy.init(config, jax.random.key(0))
    state = TrainState(0, params, optimizer.init(params), jax.random.key(1))
    shardings = train.shardings_of(meshes.make_mesh(data=jax.device_count(), fsdp=1), state, optimizer, config)
    state = jax.device_put(state, shardings.state)
    rows = meshes.shard_prompts(shardings, prompts(config, workload.prompts, workload.prompt_tokens))
    sampling = Sampling(n=workload.n, max_tokens=workload.completion_tokens)
    objective = policy_objective(policy.make_policy(config), grpo())
    make = partial(make_update, objective, optimizer, shardings=shardings)
    batches = Batches(workload.prompts, workload.n)
    sizes = (config, workload.prompt_tokens, workload.completion_tokens)
    update = train.cut_update(make, batches, shardings, *sizes)
    params = jax.tree.map(jnp.copy, state.params)  # an update donates its state

    def rollout(i: int):
        return sample(lm, params, {}, rows, sampling, 0, i)

    batch = meshes.shard_rows(shardings, grpo().credit(rewarded_rollout(workload, params), {}))

    def learn(_):
        nonlocal state
        state, metrics = update(state, batch)
        return state.params, metrics

    return {"rollout": rollout, "update": learn}


if __name__ == "__main__":
    run(Config, main)
