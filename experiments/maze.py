"""The 2x3 maze by Q-learning, SARSA, expected SARSA and double Q-learning, against its exact values.

    python experiments/maze.py --rule q_learning

Writes report.html: the table, the maze with values, best actions and visits, and the distance to the exact values over
the steps; the pictures also stand beside it.

Reached: after 5,000 steps of Q-learning the median of max |Q - Q*| is 1.4e-6, the policy optimal in 100 of 100 runs.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

import options
from classical.tabular import Hyper, make_learn
from rljax.envs.maze import cell_index, make_maze, maze_mdp
from rljax.envs.tabular import optimal_action_values
from rljax.train import pictures
from rljax.train.log import log_info, table


@dataclasses.dataclass(frozen=True)
class Config:
    """Tabular control on a maze, over seeds."""

    rule: Literal["q_learning", "sarsa", "expected_sarsa", "double_q"] = "q_learning"
    alpha: float = 0.5  # step size
    power: float = 0.0  # of the visits N that divide it: 0 fixed, 1 with alpha 1 the mean of all targets
    epsilon: float = 0.3  # probability of a uniform action
    gamma: float = 0.9  # discount
    steps: int = 5000  # of each run
    seeds: int = 100  # runs, at once
    seed: int = 0  # of the first
    rows: int = 2  # of the maze
    columns: int = 3
    start: tuple[int, int] | None = None  # row and column; None: anywhere
    goal: tuple[int, int] = (0, 2)
    trap: tuple[int, int] = (1, 2)
    walls: tuple[tuple[int, int], ...] = ()
    slip: float = 0.0  # probability that chance acts
    directory: str = "runs/maze"  # of the report


def main(cfg: Config) -> dict[str, float]:
    """Learn, draw, and return how far from the exact values the runs ended."""
    if not 0 < cfg.gamma <= 1 or cfg.seeds < 1:
        raise ValueError(f"gamma = {cfg.gamma}, seeds = {cfg.seeds}; legal: 0 < gamma <= 1, seeds from 1")
    env = make_maze(cfg.rows, cfg.columns, cfg.start, cfg.goal, cfg.trap, cfg.walls, slip=cfg.slip, observe=cell_index)
    truth = optimal_action_values(maze_mdp(env.params, cfg.gamma))
    learn = jax.jit(jax.vmap(make_learn(cfg.rule, env, cfg.rows * cfg.columns, cfg.steps), (0, None, None)))
    hyper = jax.tree.map(jnp.float32, Hyper(cfg.alpha, cfg.power, cfg.epsilon, cfg.gamma))
    found = learn(jax.random.split(jax.random.key(cfg.seed), cfg.seeds), hyper, truth)

    maze = jax.device_get(env.params)
    inside = ~(maze.walls | maze.ends).ravel()
    chosen = np.asarray(found.q).argmax(axis=2)
    worth = np.take_along_axis(np.broadcast_to(truth, found.q.shape), chosen[..., None], axis=2)[..., 0]
    right = (worth >= np.asarray(truth).max(axis=1) - 1e-4)[:, inside].all(axis=1)
    q, visits = np.asarray(found.q).mean(axis=0), np.asarray(found.visits).mean(axis=0)
    names = dict(zip(("up", "down", "left", "right"), range(4), strict=True))
    places = [divmod(int(cell), cfg.columns) for cell in np.flatnonzero(inside)]
    rows = [
        {"cell": str(place)} | {name: f"{q[c, a]:.2f} ({truth[c, a]:.2f})" for name, a in names.items()}
        for c, place in zip(np.flatnonzero(inside), places, strict=True)
    ]
    title, arrows = f"{cfg.rule}, {cfg.seeds} seeds", (maze.walls, maze.ends, maze.rewards)
    at = np.unique(np.linspace(0, cfg.steps - 1, 200).astype(int))
    distances = {cfg.rule: np.asarray(found.distance)[:, at]}
    shown = {
        "maze": pictures.maze(title, *arrows, q, visits),
        "exact": pictures.maze("exact", *arrows, truth, 0 * visits),
        "distance": pictures.curves("distance to Q*", at + 1, distances, y="max |Q - Q*|"),
    }
    table("Q, mean over seeds (exact)", rows)
    pictures.write(cfg.directory, f"{title}: Q, mean over seeds (exact)", rows, shown, dataclasses.asdict(cfg))
    reached = {"distance": float(np.median(found.distance[:, -1])), "optimal": float(right.mean())}
    log_info(
        f"median of max |Q - Q*| after {cfg.steps} steps: {reached['distance']:.2g}; "
        f"optimal policy in {right.sum()} of {cfg.seeds} runs; report in {cfg.directory}"
    )
    return reached


if __name__ == "__main__":
    options.run(Config, main)
