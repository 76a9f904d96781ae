r"""Environment steps a CPU-second of whole training runs, at PureJaxRL's settings.

    python experiments/benchmarks/control.py

PPO: CartPole, 4 environments x 128 steps, 4 epochs x 4 minibatches, 64-64 tanh actor and critic. DQN: CartPole, 10
environments, one update of 128 transitions every 10 steps, 120-84 ReLU. CPU-seconds are those of all threads of the
process: they depend little on what else the machine does, wall time does. Compilation is told apart. Beside it
stands what the gradients of the networks alone take in the same process, by plain SGD: as many, of
minibatches of the same size, in a scan.

`--threads` is XLA's pool, as PJRT_NPROC=1 sets it for any script. These programs are chains of kernels of a few
microseconds: handing them from thread to thread costs more than it gains, in CPU-seconds and in wall time.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from classical import dqn, on_policy
from rljax.envs.cartpole import make_cartpole
from rljax.models import mlp
from rljax.train.log import table


@dataclasses.dataclass(frozen=True)
class Config:
    """Medians would hide the spread: one line a run."""

    seeds: int = 3  # runs of each
    ppo_steps: int = 500_000  # of the environments, a run
    dqn_steps: int = 500_000
    threads: int = 1


def networks_alone(loss: Callable, params, rows: int, updates: int) -> float:
    """CPU-seconds of `updates` gradients on `rows` observations each, by plain SGD; no rollout, no credit."""

    def update(params, observations):
        return jax.tree.map(lambda w, g: w - 1e-4 * g, params, jax.grad(loss)(params, observations)), None

    seen = jax.random.normal(jax.random.key(0), (16, rows, 4))
    passes = jax.jit(
        lambda params: jax.lax.scan(lambda p, _: jax.lax.scan(update, p, seen), params, length=updates // 16)
    )
    jax.block_until_ready(passes(params))
    began = time.process_time()
    jax.block_until_ready(passes(params))
    return time.process_time() - began


def ppo_alone(sizes: on_policy.Sizes) -> float:
    decisions = sizes.rows * sizes.length
    updates = sizes.steps // decisions * sizes.epochs * sizes.minibatches
    params = mlp.init(jax.random.key(0), 4, 2)
    return networks_alone(
        lambda p, x: (mlp.distribution(p, x) ** 2).mean() + (mlp.values_of(p, x) ** 2).mean(),
        params,
        decisions // sizes.minibatches,
        updates,
    )


def dqn_alone(sizes: dqn.Sizes) -> float:
    target = mlp.init_q(jax.random.key(0), 4, 2)
    return networks_alone(
        lambda p, x: ((mlp.q_values(p, x) - mlp.q_values(target, x)) ** 2).mean(),
        target,
        sizes.batch,
        (sizes.steps - sizes.start) // sizes.every * sizes.updates,
    )


def main(cfg: Config) -> None:
    os.environ["PJRT_NPROC"] = str(cfg.threads)  # read when jax first sees its devices
    env = make_cartpole()
    works = {
        "ppo": (on_policy, ("ppo", env, on_policy.Sizes(cfg.ppo_steps, rows=4)), on_policy.Hyper(2.5e-4), ppo_alone),
        "dqn": (dqn, (env, dqn.Sizes(cfg.dqn_steps)), dqn.Hyper(), dqn_alone),
    }
    rows = []
    for name, (module, arguments, hyper, alone) in works.items():
        hyper, steps = jax.tree.map(jnp.float32, hyper), arguments[-1].steps
        began = time.process_time()
        train = jax.jit(module.make_train(*arguments))
        train = train.lower(module.init(env, jax.random.key(0)), jax.random.key(0), hyper).compile()
        compiling = time.process_time() - began
        networks = alone(arguments[-1])
        for seed in range(cfg.seeds):
            key = jax.random.key(seed)
            params = jax.block_until_ready(module.init(env, key))
            began, clock = time.process_time(), time.perf_counter()
            _, curve = jax.block_until_ready(train(params, jax.random.fold_in(key, 1), hyper))
            seconds, wall = time.process_time() - began, time.perf_counter() - clock
            rows.append(
                {
                    "run": f"{name}, seed {seed}",
                    "compile, CPU-s": compiling,
                    "CPU-s": seconds,
                    "networks alone, CPU-s": networks,
                    "wall, s": wall,
                    "steps a CPU-s": steps / seconds,
                    "return, last tenth": float(on_policy.last_tenth(curve)),
                }
            )
    table(f"{os.cpu_count()} cores, {cfg.threads} threads, load {os.getloadavg()[0]:.1f}", rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
