r"""Environment steps a CPU-second of whole training runs, at PureJaxRL's settings.

    python experiments/benchmarks/control.py

PPO: CartPole, 4 environments x 128 steps, 4 epochs x 4 minibatches, 64-64 tanh actor and critic. DQN: CartPole, 10
environments, one update of 128 transitions every 10 steps, 120-84 ReLU. CPU-seconds are those of all threads of the
process: they depend little on what else the machine does, wall time does. Compilation is told apart. The ceiling is
what the multiplications of the networks alone would take at the rate of the best large product in the same process.

`--threads` is XLA's pool, as PJRT_NPROC=1 sets it for any script. These programs are chains of kernels of a few
microseconds: handing them from thread to thread costs more than it gains, in CPU-seconds and in wall time.
"""

import dataclasses
import os
import sys
import time
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common

from classical import dqn, on_policy
from rljax.envs.cartpole import make_cartpole
from rljax.train.log import table


@dataclasses.dataclass(frozen=True)
class Config:
    """Medians would hide the spread: one line a run."""

    seeds: int = 3  # runs of each
    ppo_steps: int = 500_000  # of the environments, a run
    dqn_steps: int = 500_000
    threads: int = 1


def flops(widths: tuple[int, ...], forwards: float, updates: float) -> float:
    """Of a network, one example: passes forward, and updates of a pass, the weights' and the layers' gradients."""
    layers = [2 * a * b for a, b in pairwise(widths)]
    return (forwards + 3 * updates) * sum(layers) - updates * layers[0]  # nobody asks for the input's gradient


def ppo_flops(sizes: on_policy.Sizes) -> float:
    """An environment step: the actor acts, the critic values what it saw and what came after, both learn."""
    return flops((4, 64, 64, 2), 1, sizes.epochs) + flops((4, 64, 64, 1), 2, sizes.epochs)


def dqn_flops(sizes: dqn.Sizes) -> float:
    """An environment step: the network acts, the target values, the network learns, once it has begun to."""
    learnt = (1 - sizes.start / sizes.steps) * sizes.batch * sizes.updates / sizes.every
    return flops((4, 120, 84, 2), 1 + learnt, learnt)


def main(cfg: Config) -> None:
    os.environ["PJRT_NPROC"] = str(cfg.threads)  # read when jax first sees its devices
    env = make_cartpole()
    works = {
        "ppo": (on_policy, ("ppo", env, on_policy.Sizes(cfg.ppo_steps, rows=4)), on_policy.Hyper(2.5e-4), ppo_flops),
        "dqn": (dqn, (env, dqn.Sizes(cfg.dqn_steps)), dqn.Hyper(), dqn_flops),
    }
    rows = []
    for name, (module, arguments, hyper, flops_of) in works.items():
        hyper, steps = jax.tree.map(jnp.float32, hyper), arguments[-1].steps
        began = time.process_time()
        train = jax.jit(module.make_train(*arguments))
        train = train.lower(module.init(env, jax.random.key(0)), jax.random.key(0), hyper).compile()
        compiling = time.process_time() - began
        for seed in range(cfg.seeds):
            key = jax.random.key(seed)
            params = jax.block_until_ready(module.init(env, key))
            ceiling = steps * flops_of(arguments[-1]) / common.peak(3)
            began, clock = time.process_time(), time.perf_counter()
            _, curve = jax.block_until_ready(train(params, jax.random.fold_in(key, 1), hyper))
            seconds, wall = time.process_time() - began, time.perf_counter() - clock
            rows.append(
                {
                    "run": f"{name}, seed {seed}",
                    "compile, CPU-s": compiling,
                    "CPU-s": seconds,
                    "ceiling, CPU-s": ceiling,
                    "wall, s": wall,
                    "steps a CPU-s": steps / seconds,
                    "return, last tenth": float(on_policy.last_tenth(curve)),
                }
            )
    table(f"{os.cpu_count()} cores, {cfg.threads} threads, load {os.getloadavg()[0]:.1f}", rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
