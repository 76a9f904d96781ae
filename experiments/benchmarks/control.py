r"""Environment steps per CPU-second of whole training runs, at PureJaxRL's settings.

    python experiments/benchmarks/control.py

PPO: CartPole, 4 environments x 128 steps, 4 epochs x 4 minibatches, 64-64 tanh actor and critic. DQN: CartPole, 10
environments, one update of 128 transitions every 10 steps, 120-84 ReLU. CPU-seconds are those of all threads of the
process: they depend little on what else the machine does, wall time does. Compilation is reported separately. "Networks
alone" is the time that the gradients of the networks take in the same process, by plain SGD: as many of them, on
minibatches of the same size, in a scan.

`--threads` is XLA's pool, as PJRT_NPROC=1 sets it for any script. These programs are chains of kernels of a few
microseconds: handing them from thread to thread costs more than it gains, in CPU-seconds and in wall time.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.benchmarks.common import Output, named, run, trace, write_figures
from experiments.control_methods import dqn, on_policy
from rljax.envs.cartpole import make_cartpole
from rljax.envs.env import Env
from rljax.models import mlp
from rljax.train.log import table
from rljax.types import Params


@dataclasses.dataclass(frozen=True)
class Config(Output):
    """One line for each run: medians would hide the spread. A profile is of one whole run of each method."""

    seeds: int = 3  # runs of each method
    ppo_steps: int = 500_000  # of all environments together, in a run
    dqn_steps: int = 500_000
    threads: int = 1  # of XLA


class Benchmark(NamedTuple):
    train: Callable  # (params, key, hyper) -> (params, curve)
    init_params: Callable  # (env, key) -> params
    hyper: on_policy.Hyperparams | dqn.Hyperparams
    total_steps: int
    networks_alone: Callable  # () -> CPU-seconds


def main(cfg: Config) -> dict[str, float]:
    """Measure, print and return the figures."""
    os.environ["PJRT_NPROC"] = str(cfg.threads)  # read when jax first uses its devices
    env = make_cartpole()
    ppo_sizes = on_policy.Sizes(cfg.ppo_steps, num_envs=4)
    dqn_sizes = dqn.Sizes(cfg.dqn_steps)
    benchmarks = {
        "ppo": Benchmark(
            on_policy.make_train(env, on_policy.PPO, ppo_sizes),
            on_policy.init_params,
            on_policy.Hyperparams(2.5e-4),
            ppo_sizes.total_steps,
            lambda: ppo_networks_alone(ppo_sizes),
        ),
        "dqn": Benchmark(
            dqn.make_train(env, dqn_sizes),
            dqn.init_params,
            dqn.Hyperparams(),
            dqn_sizes.total_steps,
            lambda: dqn_networks_alone(dqn_sizes),
        ),
    }
    rows = []
    for name, benchmark in benchmarks.items():
        rows += measure(name, benchmark, env, cfg.seeds, cfg.profile)
    table(f"{os.cpu_count()} cores, {cfg.threads} threads, load {os.getloadavg()[0]:.1f}", rows)
    figures = named(rows)
    write_figures(cfg.json, figures)
    return figures


def measure(name: str, benchmark: Benchmark, env: Env, seeds: int, profile: str) -> Iterator[dict]:
    """A row for each seed."""
    hyper = jax.tree.map(jnp.float32, benchmark.hyper)
    start = time.process_time()
    example = benchmark.init_params(env, jax.random.key(0))
    train = jax.jit(benchmark.train).lower(example, jax.random.key(0), hyper).compile()
    compile_seconds = time.process_time() - start
    networks_seconds = benchmark.networks_alone()

    def run(seed: int):
        return train(benchmark.init_params(env, jax.random.key(seed)), jax.random.key(seed), hyper)

    trace({name: run}, profile)
    for seed in range(seeds):
        key = jax.random.key(seed)
        params = jax.block_until_ready(benchmark.init_params(env, key))
        cpu_start = time.process_time()
        wall_start = time.perf_counter()
        _, curve = jax.block_until_ready(train(params, jax.random.fold_in(key, 1), hyper))
        cpu_seconds = time.process_time() - cpu_start
        wall_seconds = time.perf_counter() - wall_start
        yield {
            "run": f"{name}, seed {seed}",
            "compile, CPU-s": compile_seconds,
            "CPU-s": cpu_seconds,
            "networks alone, CPU-s": networks_seconds,
            "wall, s": wall_seconds,
            "steps a CPU-s": benchmark.total_steps / cpu_seconds,
            "return, last tenth": float(on_policy.final_return(curve)),
        }


# ----------------------------------------------------------------------------------------------------- networks alone


def networks_alone(loss: Callable, params: Params, rows: int, updates: int) -> float:
    """CPU-seconds of `updates` gradients on `rows` observations each, by plain SGD; no rollout, no credit."""

    def update(params, observations):
        gradients = jax.grad(loss)(params, observations)
        return jax.tree.map(lambda w, g: w - 1e-4 * g, params, gradients), None

    observations = jax.random.normal(jax.random.key(0), (16, rows, 4))

    def pass_over_observations(params, _):
        return jax.lax.scan(update, params, observations)

    run = jax.jit(lambda params: jax.lax.scan(pass_over_observations, params, length=updates // 16))
    jax.block_until_ready(run(params))
    start = time.process_time()
    jax.block_until_ready(run(params))
    return time.process_time() - start


def ppo_networks_alone(sizes: on_policy.Sizes) -> float:
    def loss(params, observations):
        actor = (mlp.distribution(params, observations) ** 2).mean()
        critic = (mlp.values_of(params, observations) ** 2).mean()
        return actor + critic

    params = mlp.init(jax.random.key(0), 4, 2)
    rows = sizes.num_envs * sizes.num_steps // sizes.minibatches
    updates = sizes.num_rollouts * sizes.epochs * sizes.minibatches
    return networks_alone(loss, params, rows, updates)


def dqn_networks_alone(sizes: dqn.Sizes) -> float:
    target = mlp.init_q(jax.random.key(0), 4, 2)

    def loss(params, observations):
        error = mlp.q_values(params, observations) - mlp.q_values(target, observations)
        return (error**2).mean()

    updates = (sizes.total_steps - sizes.learning_starts) // sizes.train_frequency * sizes.gradient_steps
    return networks_alone(loss, target, sizes.batch_size, updates)


if __name__ == "__main__":
    run(Config, main)
