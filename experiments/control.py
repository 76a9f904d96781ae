"""Classical control by the estimators of language models, over seeds: DQN, REINFORCE, VPG, TRPO, PPO.

    python experiments/control.py --algo ppo --env cartpole

A run is one compiled function, train(params, key, hyper); all seeds share its compilation. Settings that are not given
are the tuned ones in TUNED. Writes report.html: a table of the seeds, the learning curve (mean, 95 % interval of the
mean) and, for CartPole, frames of an episode; the pictures also stand beside it.

Reached (seeds 0-4, greedy return, median and worst): PPO on CartPole 500, 500 after 150,000 steps, 1.0 to 1.1
CPU-seconds a run; on Acrobot -82.2, -92.2; on Pendulum -164.0, -182.1; VPG on CartPole 500, 498; TRPO on CartPole 500,
500, on Acrobot -84.2, -88.8. See docs/control.md.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import options
from classical import dqn, on_policy
from rljax.envs.acrobot import make_acrobot
from rljax.envs.cartpole import make_cartpole
from rljax.envs.catch import make_catch
from rljax.envs.env import Env
from rljax.envs.four_rooms import make_four_rooms
from rljax.envs.gymnax import make_gymnax
from rljax.envs.maze import make_maze
from rljax.envs.pendulum import make_pendulum
from rljax.train import pictures
from rljax.train.log import log_info, table

ENVS: dict[str, Callable] = {
    "acrobot": make_acrobot,
    "cartpole": make_cartpole,
    "catch": make_catch,
    "four_rooms": make_four_rooms,
    "maze": make_maze,
    "pendulum": make_pendulum,
}


def make_env(name: str) -> Env:
    """One of ENVS, or gymnax:NAME.

    Raises ValueError for another name.
    """
    if name.startswith("gymnax:"):
        return make_gymnax(name.removeprefix("gymnax:"))
    if name not in ENVS:
        raise ValueError(f"no environment {name!r}; legal: {', '.join(ENVS)}, gymnax:NAME")
    return ENVS[name]()


class Settings(NamedTuple):
    """Of a run: what is compiled, and what is traced."""

    sizes: on_policy.Sizes | dqn.Sizes
    hyper: on_policy.Hyper | dqn.Hyper
    network: dict = {}  # noqa: RUF012  what `init` is given


CLIPPED = on_policy.Sizes(minibatches=8, value_clip=None)
TUNED = {
    ("dqn", "cartpole"): Settings(dqn.Sizes(), dqn.Hyper()),
    ("dqn", "maze"): Settings(dqn.Sizes(30_000, target_every=200, start=1000), dqn.Hyper(1e-3, 0.9, 1.0)),
    ("off_policy_pg", "catch"): Settings(
        on_policy.Sizes(60_000, rows=128, length=9, lag=4), on_policy.Hyper(1e-2, gamma=1.0, entropy=0.0)
    ),
    ("vtrace", "catch"): Settings(
        on_policy.Sizes(100_000, rows=32, length=36, epochs=1, anneal=False, lag=4),
        on_policy.Hyper(3e-3, gamma=1.0, lam=1.0),
    ),
    **{
        (algo, env): Settings(
            on_policy.Sizes(steps, rows=rows, length=length), on_policy.Hyper(1e-2, gamma=gamma, entropy=0.0)
        )
        for env, steps, rows, length, gamma in (("catch", 60_000, 128, 9, 1.0), ("cartpole", 300_000, 16, 500, 0.99))
        for algo in on_policy.REINFORCE
    },
    ("vpg", "cartpole"): Settings(
        on_policy.Sizes(100_000, epochs=40, minibatches=1), on_policy.Hyper(1e-2, 1e-2, lam=0.97, entropy=0.0)
    ),
    ("trpo", "acrobot"): Settings(CLIPPED._replace(steps=200_000, length=256), on_policy.Hyper(lam=0.97)),
    ("trpo", "cartpole"): Settings(CLIPPED, on_policy.Hyper(lam=0.97)),
    ("trpo", "catch"): Settings(CLIPPED._replace(steps=70_000, rows=32, length=36), on_policy.Hyper(lam=0.97)),
    ("ppo", "acrobot"): Settings(CLIPPED._replace(steps=200_000, length=256), on_policy.Hyper(2e-3)),
    ("ppo", "cartpole"): Settings(CLIPPED, on_policy.Hyper(2e-3)),
    ("ppo", "pendulum"): Settings(
        CLIPPED._replace(steps=300_000, epochs=10), on_policy.Hyper(2e-3, gamma=0.95, entropy=0.0)
    ),
    ("ppo", "gymnax:Breakout-MinAtar"): Settings(
        on_policy.Sizes(1_000_000, rows=64, length=64, minibatches=8),
        on_policy.Hyper(5e-3),
        {"activation": jax.nn.relu},
    ),
}
UNTUNED = {
    "dqn": Settings(dqn.Sizes(), dqn.Hyper()),
    "trpo": TUNED["trpo", "cartpole"],
    **{algo: TUNED["reinforce", "cartpole"] for algo in on_policy.EPISODIC},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """One algorithm on one environment, over seeds."""

    algo: Literal[
        "dqn",
        "off_policy_pg",
        "ppo",
        "ppo_penalty",
        "reinforce",
        "reinforce_baseline",
        "reinforce_to_go",
        "trpo",
        "vpg",
        "vtrace",
    ] = "ppo"
    env: str = "cartpole"  # acrobot, cartpole, catch, four_rooms, maze, pendulum, or gymnax:NAME
    seeds: int = 5  # runs, one after another
    seed: int = 0  # of the first
    steps: int | None = None  # of the environments, in all
    rows: int | None = None  # environments at once
    learning_rate: float | None = None
    gamma: float | None = None
    delta: float | None = None  # trpo's bound on the mean KL of a policy step, which has no learning rate
    directory: str = ""  # of the report; default runs/control/ALGO-ENV


def settings(cfg: Config) -> Settings:
    """The tuned ones, or the algorithm's defaults, with what the command line changes."""
    other = "learning_rate" if cfg.algo == "trpo" else "delta"
    if getattr(cfg, other) is not None:
        raise ValueError(f"{cfg.algo} has no {other}; legal: {'delta' if cfg.algo == 'trpo' else 'learning_rate'}")
    if cfg.gamma is not None and not 0 <= cfg.gamma <= 1:
        raise ValueError(f"gamma = {cfg.gamma}; legal: 0 to 1")
    if cfg.gamma is not None and cfg.algo in ("reinforce", "off_policy_pg"):
        raise ValueError(f"{cfg.algo} credits with the whole return, undiscounted: it reads no gamma; leave it out")
    default = UNTUNED.get(cfg.algo, Settings(CLIPPED, on_policy.Hyper(2e-3)))
    sizes, hyper, network = TUNED.get((cfg.algo, cfg.env), default)
    given = {name: value for name, value in vars(cfg).items() if value is not None}
    sizes = sizes._replace(**{name: given[name] for name in ("steps", "rows") if name in given})
    hyper = hyper._replace(**{name: given[name] for name in ("learning_rate", "gamma", "delta") if name in given})
    return Settings(sizes, jax.tree.map(jnp.float32, hyper), network)


def main(cfg: Config) -> dict[str, float]:
    """Train all seeds, draw, and return the median and the least of their greedy returns."""
    if cfg.seeds < 1:
        raise ValueError(f"seeds = {cfg.seeds}; legal: at least 1")
    env, (sizes, hyper, network) = make_env(cfg.env), settings(cfg)
    if cfg.algo == "dqn":
        train, init, play = dqn.make_train(env, sizes), dqn.init, dqn.play_greedily(env, limit_of(env))
    else:
        train, init = on_policy.make_train(cfg.algo, env, sizes), on_policy.init
        play = on_policy.play_greedily(env, limit_of(env))
    train, play = jax.jit(train), jax.jit(play, static_argnums=2)

    rows, drawn = [], []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        key = jax.random.key(seed)
        params, began = init(env, key, **network), time.process_time()
        params, curve = jax.block_until_ready(train(params, jax.random.fold_in(key, 1), hyper))
        seconds = time.process_time() - began
        greedy = play(params, jax.random.fold_in(key, 2), 64).rewards.sum(axis=1)
        last = float(on_policy.last_tenth(curve))
        rows.append({"seed": seed, "last tenth": last, "greedy": float(greedy.mean()), "cpu seconds": seconds})
        drawn.append(binned(curve))
    table(f"{cfg.algo} on {cfg.env}, {sizes.steps:,} steps; the first run compiles", rows)

    title = f"{cfg.algo} on {cfg.env}, {cfg.seeds} seeds"
    at = np.linspace(0, sizes.steps, drawn[0].size + 1)[1:]
    shown = {"curve": pictures.curves(title, at, {cfg.algo: np.stack(drawn)})}
    if cfg.env == "cartpole":
        traj = play(params, jax.random.key(cfg.seed), 1)
        times = np.linspace(0, int(traj.mask.sum()) - 1, 8).astype(int)
        frames = np.asarray(traj.inputs)[0, times]
        shown["frames"] = pictures.cartpole(f"{cfg.algo}, the last seed's policy", frames, times)
    directory = cfg.directory or f"runs/control/{cfg.algo}-{cfg.env.replace(':', '-')}"
    pictures.write(directory, title, rows, shown, {**sizes._asdict(), **hyper._asdict()})
    returns = [row["greedy"] for row in rows]
    reached = {"median": float(np.median(returns)), "worst": min(returns)}
    log_info(f"greedy return: median {reached['median']:.4g}, worst {reached['worst']:.4g}; report in {directory}")
    return reached


def limit_of(env: Env) -> int:
    """Steps after which an episode is cut, by the environment's own parameters; 500 where they name none."""
    named = (getattr(env.params, name, None) for name in ("max_steps", "max_steps_in_episode"))
    return int(next((limit for limit in named if limit is not None), 500))


def binned(curve: dict, bins: int = 50) -> np.ndarray:
    """Mean return of the episodes that ended in each stretch of training; where none did, the stretch before's.

    Raises ValueError where none ended at all.
    """
    if not np.asarray(curve["episodes"]).any():
        raise ValueError("no episode ended in this run: take more --steps")
    total, count = (np.asarray(x, float) for x in (curve["return"] * curve["episodes"], curve["episodes"]))
    parts = np.array_split(np.arange(len(count)), min(bins, len(count)))
    means = np.array([total[p].sum() / count[p].sum() if count[p].sum() else np.nan for p in parts])
    known = np.flatnonzero(np.isfinite(means))
    return means[known[np.clip(np.searchsorted(known, np.arange(len(means)), "right") - 1, 0, None)]]


if __name__ == "__main__":
    options.run(Config, main)
