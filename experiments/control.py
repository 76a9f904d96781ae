"""Classical control by the estimators of language models, over seeds: DQN, REINFORCE, VPG, TRPO, PPO, V-trace.

    python experiments/control.py --algo ppo --env cartpole

A run is one compiled function, train(params, key, hyper); all seeds share its compilation. Settings that are not given
are the tuned ones in TUNED. Writes report.html: a table of the seeds, the learning curve (the mean, and its 95 %
confidence interval) and, for CartPole, frames of an episode; the figures are also saved beside it.

Reached (seeds 0-4, greedy return, median and worst): PPO on CartPole 500, 500 after 150,000 steps, 1.0 to 1.1
CPU-seconds a run; on Acrobot -82.2, -92.2; on Pendulum -164.0, -182.1; VPG on CartPole 500, 498; TRPO on CartPole 500,
500, on Acrobot -84.2, -88.8. See docs/control.md.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import pictures
from experiments.common.command_line import run
from experiments.control_methods import dqn, on_policy
from rljax.envs.acrobot import make_acrobot
from rljax.envs.cartpole import make_cartpole
from rljax.envs.catch import make_catch
from rljax.envs.env import Env
from rljax.envs.four_rooms import make_four_rooms
from rljax.envs.gymnax import make_gymnax
from rljax.envs.maze import make_maze
from rljax.envs.pendulum import make_pendulum
from rljax.train.log import log_info, table

# ------------------------------------------------------------------------------------- names of the command line

ENVS: dict[str, Callable[[], Env]] = {
    "acrobot": make_acrobot,
    "cartpole": make_cartpole,
    "catch": make_catch,
    "four_rooms": make_four_rooms,
    "maze": make_maze,
    "pendulum": make_pendulum,
}


class Trainer(NamedTuple):
    """What `main` needs of a method."""

    make_train: Callable  # (env, sizes) -> train(params, key, hyper) -> (params, curve)
    init_params: Callable  # (env, key, **network) -> params
    make_play: Callable  # (env, max_steps) -> play(params, key, num_episodes) -> Trajectory
    reads: tuple[str, ...]  # the fields of Sizes and Hyperparams that the method reads
    whole_episodes: bool = False  # a rollout is an episode of each environment


def on_policy_trainer(method: on_policy.Method, *reads: str) -> Trainer:
    """reads: beside the sizes that every rollout has."""

    def make_train(env: Env, sizes: on_policy.Sizes) -> Callable:
        return on_policy.make_train(env, method, sizes)

    reads = ("total_steps", "num_envs", "num_steps", "actor_lag", *reads)
    whole_episodes = method.collect is on_policy.collect_episodes
    return Trainer(make_train, on_policy.init_params, on_policy.make_play, reads, whole_episodes)


ACTOR = ("learning_rate", "entropy_coefficient")
SEPARATE_CRITIC = ("epochs", "minibatches", "critic_learning_rate", "gamma", "lam")
JOINT_CRITIC = (*ACTOR, "epochs", "minibatches", "anneal_learning_rate", "gamma", "lam")
TRAINERS: dict[str, Trainer] = {
    "dqn": Trainer(dqn.make_train, dqn.init_params, dqn.make_play, (*dqn.Sizes._fields, *dqn.Hyperparams._fields)),
    "off_policy_pg": on_policy_trainer(on_policy.OFF_POLICY_PG, *ACTOR),  # undiscounted
    "ppo": on_policy_trainer(on_policy.PPO, *JOINT_CRITIC, "clip_range", "value_clip"),
    "ppo_penalty": on_policy_trainer(on_policy.PPO_PENALTY, *JOINT_CRITIC, "value_clip"),
    "reinforce": on_policy_trainer(on_policy.REINFORCE, *ACTOR),  # undiscounted
    "reinforce_baseline": on_policy_trainer(on_policy.REINFORCE_BASELINE, *ACTOR, "gamma"),
    "reinforce_to_go": on_policy_trainer(on_policy.REINFORCE_TO_GO, *ACTOR, "gamma"),
    "trpo": on_policy_trainer(on_policy.TRPO, *SEPARATE_CRITIC, "delta", "damping", "kl_direction"),
    "vpg": on_policy_trainer(on_policy.VPG, *ACTOR, *SEPARATE_CRITIC),
    "vtrace": on_policy_trainer(on_policy.VTRACE, *JOINT_CRITIC),
}
HYPER_FLAGS = ("learning_rate", "gamma", "delta")
AlgorithmName = Literal[tuple(TRAINERS)]


def make_env(name: str) -> Env:
    """One of ENVS, or gymnax:NAME.

    Raises ValueError for another name.
    """
    if name.startswith("gymnax:"):
        return make_gymnax(name.removeprefix("gymnax:"))
    if name not in ENVS:
        raise ValueError(f"no environment {name!r}; legal: {', '.join(ENVS)}, gymnax:NAME")
    return ENVS[name]()


# ------------------------------------------------------------------------------------------------- tuned settings


class Settings(NamedTuple):
    """Of a run."""

    sizes: on_policy.Sizes | dqn.Sizes  # static
    hyper: on_policy.Hyperparams | dqn.Hyperparams  # traced
    network: dict = {}  # noqa: RUF012  arguments of `init_params`


PPO_SIZES = on_policy.Sizes(minibatches=8, value_clip=None)
REINFORCE_CATCH = Settings(
    on_policy.Sizes(60_000, num_envs=128, num_steps=9),
    on_policy.Hyperparams(1e-2, gamma=1.0, entropy_coefficient=0.0),
)
REINFORCE_CARTPOLE = Settings(
    on_policy.Sizes(300_000, num_envs=16, num_steps=500),
    on_policy.Hyperparams(1e-2, gamma=0.99, entropy_coefficient=0.0),
)
PPO_DEFAULT = Settings(PPO_SIZES, on_policy.Hyperparams(2e-3))
TRPO_DEFAULT = Settings(PPO_SIZES, on_policy.Hyperparams(lam=0.97))
# Its ratio is that of the policy before the update: one update of each rollout, so short rollouts, and an actor that
# lags, or every ratio would be 1.
VTRACE_SIZES = on_policy.Sizes(num_steps=32, epochs=1, minibatches=1, anneal_learning_rate=False, actor_lag=4)
DQN_DEFAULT = Settings(dqn.Sizes(), dqn.Hyperparams())

DEFAULTS: dict[str, Settings] = {  # where TUNED has no entry; whole episodes are then as long as the environment's
    "dqn": DQN_DEFAULT,
    "off_policy_pg": REINFORCE_CARTPOLE,  # on-policy: a product of hundreds of ratios is of no use
    "ppo": PPO_DEFAULT,
    "ppo_penalty": PPO_DEFAULT,
    "reinforce": REINFORCE_CARTPOLE,
    "reinforce_baseline": REINFORCE_CARTPOLE,
    "reinforce_to_go": REINFORCE_CARTPOLE,
    "trpo": TRPO_DEFAULT,
    "vpg": PPO_DEFAULT,
    "vtrace": Settings(VTRACE_SIZES, on_policy.Hyperparams(1e-3)),
}
TUNED: dict[tuple[str, str], Settings] = {
    ("dqn", "cartpole"): DQN_DEFAULT,
    ("dqn", "maze"): Settings(
        dqn.Sizes(30_000, target_frequency=200, learning_starts=1000),
        dqn.Hyperparams(1e-3, 0.9, 1.0),
    ),
    ("off_policy_pg", "catch"): Settings(
        on_policy.Sizes(60_000, num_envs=128, num_steps=9, actor_lag=4),
        on_policy.Hyperparams(1e-2, gamma=1.0, entropy_coefficient=0.0),
    ),
    ("vtrace", "catch"): Settings(
        VTRACE_SIZES._replace(total_steps=100_000, num_envs=32, num_steps=9),
        on_policy.Hyperparams(3e-3, gamma=1.0, lam=1.0),
    ),
    ("reinforce", "catch"): REINFORCE_CATCH,
    ("reinforce_baseline", "catch"): REINFORCE_CATCH,
    ("reinforce_to_go", "catch"): REINFORCE_CATCH,
    ("reinforce", "cartpole"): REINFORCE_CARTPOLE,
    ("reinforce_baseline", "cartpole"): REINFORCE_CARTPOLE,
    ("reinforce_to_go", "cartpole"): REINFORCE_CARTPOLE,
    ("vpg", "cartpole"): Settings(
        on_policy.Sizes(100_000, epochs=40, minibatches=1),
        on_policy.Hyperparams(1e-2, 1e-2, lam=0.97, entropy_coefficient=0.0),
    ),
    ("trpo", "acrobot"): Settings(
        PPO_SIZES._replace(total_steps=200_000, num_steps=256), on_policy.Hyperparams(lam=0.97)
    ),
    ("trpo", "cartpole"): TRPO_DEFAULT,
    ("trpo", "catch"): Settings(
        PPO_SIZES._replace(total_steps=70_000, num_envs=32, num_steps=36), on_policy.Hyperparams(lam=0.97)
    ),
    ("ppo", "acrobot"): Settings(PPO_SIZES._replace(total_steps=200_000, num_steps=256), on_policy.Hyperparams(2e-3)),
    ("ppo", "cartpole"): PPO_DEFAULT,
    ("ppo", "pendulum"): Settings(
        PPO_SIZES._replace(total_steps=300_000, epochs=10),
        on_policy.Hyperparams(2e-3, gamma=0.95, entropy_coefficient=0.0),
    ),
    ("ppo", "gymnax:Breakout-MinAtar"): Settings(
        on_policy.Sizes(1_000_000, num_envs=64, num_steps=64, minibatches=8),
        on_policy.Hyperparams(5e-3),
        {"activation": jax.nn.relu},
    ),
}


# ------------------------------------------------------------------------------------------------------ the recipe


@dataclasses.dataclass(frozen=True)
class Config:
    """One algorithm on one environment, over seeds."""

    algo: AlgorithmName = "ppo"  # off_policy_pg is off-policy on catch alone; elsewhere it is reinforce with a baseline
    env: str = "cartpole"  # acrobot, cartpole, catch, four_rooms, maze, pendulum, or gymnax:NAME
    seeds: int = 5  # runs, one after another
    seed: int = 0  # of the first run
    total_steps: int | None = None  # of all environments together; of whole episodes also what is left after their ends
    num_envs: int | None = None  # environments at once
    learning_rate: float | None = None
    gamma: float | None = None  # discount
    delta: float | None = None  # trpo: bound on the mean KL of a policy step, in nats; it has no learning rate
    directory: str = ""  # of the report; default runs/control/ALGO-ENV


def main(cfg: Config) -> dict[str, float]:
    """Train all seeds, write the report, and return the median and the worst of their greedy returns."""
    if cfg.seeds < 1:
        raise ValueError(f"seeds = {cfg.seeds}; legal: at least 1")
    env = make_env(cfg.env)
    trainer = TRAINERS[cfg.algo]
    sizes, hyper, network = settings(cfg, env)
    train = jax.jit(trainer.make_train(env, sizes))
    play = jax.jit(trainer.make_play(env, max_episode_steps(env)), static_argnums=2)

    rows = []
    curves = []
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        key = jax.random.key(seed)
        params = trainer.init_params(env, key, **network)
        start = time.process_time()
        params, curve = jax.block_until_ready(train(params, jax.random.fold_in(key, 1), hyper))
        seconds = time.process_time() - start
        greedy = play(params, jax.random.fold_in(key, 2), 64).rewards.sum(axis=1)
        final = float(on_policy.final_return(curve))
        rows.append({"seed": seed, "last tenth": final, "greedy": float(greedy.mean()), "cpu seconds": seconds})
        curves.append(binned_returns(curve))
    table(f"{cfg.algo} on {cfg.env}, {sizes.total_steps:,} steps; the first run compiles", rows)

    directory = cfg.directory or f"runs/control/{cfg.algo}-{cfg.env.replace(':', '-')}"
    title = f"{cfg.algo} on {cfg.env}, {cfg.seeds} seeds"
    figures = {"curve": curve_figure(title, cfg.algo, sizes.total_steps, np.stack(curves))}
    if cfg.env == "cartpole":
        figures["frames"] = cartpole_figure(f"{cfg.algo}, the last seed's policy", partial(play, params), cfg.seed)
    read = {name: x for name, x in (sizes._asdict() | hyper._asdict()).items() if name in trainer.reads}
    pictures.write_report(directory, title, rows, figures, read)
    returns = [row["greedy"] for row in rows]
    reached = {"median": float(np.median(returns)), "worst": min(returns)}
    log_info(f"greedy return: median {reached['median']:.4g}, worst {reached['worst']:.4g}; report in {directory}")
    return reached


def settings(cfg: Config, env: Env) -> Settings:
    """The tuned ones, or the algorithm's defaults, with what the command line changes.

    Raises ValueError for a flag that the algorithm does not read, and for a number that no run can have.
    """
    trainer = TRAINERS[cfg.algo]
    given = {name: value for name, value in vars(cfg).items() if value is not None}
    legal = [name for name in HYPER_FLAGS if name in trainer.reads]
    for name in HYPER_FLAGS:
        if name in given and name not in legal:
            raise ValueError(f"{cfg.algo} reads no {name}; legal: {', '.join(legal)}")
    if cfg.gamma is not None and not 0 <= cfg.gamma <= 1:
        raise ValueError(f"gamma = {cfg.gamma}; legal: 0 to 1")
    for name in ("total_steps", "num_envs", "learning_rate", "delta"):
        if name in given and not given[name] > 0:
            raise ValueError(f"{name} = {given[name]}; legal: above 0")
    sizes, hyper, network = TUNED.get((cfg.algo, cfg.env), DEFAULTS[cfg.algo])
    if trainer.whole_episodes and (cfg.algo, cfg.env) not in TUNED:
        sizes = sizes._replace(num_steps=max_episode_steps(env))
    sizes = sizes._replace(**{name: given[name] for name in ("total_steps", "num_envs") if name in given})
    hyper = hyper._replace(**{name: given[name] for name in legal if name in given})
    return Settings(sizes, jax.tree.map(jnp.float32, hyper), network)


def max_episode_steps(env: Env) -> int:
    """Steps after which an episode is truncated, by the environment's own parameters; 500 where they have none."""
    for name in ("max_steps", "max_steps_in_episode"):
        limit = getattr(env.params, name, None)
        if limit is not None:
            return int(limit)
    return 500


def binned_returns(curve: dict, bins: int = 50) -> np.ndarray:
    """Mean return of the episodes that ended in each part of training; where none did, that of the part before.

    Raises ValueError where none ended at all.
    """
    count = np.asarray(curve["episodes"], float)
    total = np.asarray(curve["return"] * curve["episodes"], float)
    if not count.any():
        raise ValueError("no episode ended in this run: take more --total_steps")
    parts = np.array_split(np.arange(len(count)), min(bins, len(count)))
    means = np.array([total[part].sum() / count[part].sum() if count[part].sum() else np.nan for part in parts])
    known = np.flatnonzero(np.isfinite(means))
    latest = np.searchsorted(known, np.arange(len(means)), "right") - 1  # -1 before the first known one
    return means[known[np.clip(latest, 0, None)]]


def curve_figure(title: str, name: str, total_steps: int, returns: np.ndarray) -> str:
    """returns: [seeds bins]."""
    steps = np.linspace(0, total_steps, returns.shape[1] + 1)[1:]
    return pictures.learning_curves(title, steps, {name: returns})


def cartpole_figure(title: str, play: Callable, seed: int, frames: int = 8) -> str:
    """Frames of one episode of CartPole. play: (key, num_episodes) -> Trajectory."""
    traj = play(jax.random.key(seed), 1)
    times = np.linspace(0, int(traj.mask.sum()) - 1, frames).astype(int)
    return pictures.draw_cartpole(title, np.asarray(traj.inputs)[0, times], times)


if __name__ == "__main__":
    run(Config, main)
