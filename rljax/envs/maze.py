"""Mazes. The default is the 2x3 one: from the upper left corner to the goal in the upper right, past a trap below it.

    . . G
    . . T

Four actions (up, down, left, right); a step off the grid or into a wall stays; goal +10, trap -10, both end the
episode; every other step 0. With γ = 0.9, Q*(row, column, action) of the four cells where one chooses is

              up     down   left   right
    (0, 0)    8.1    7.29   8.1    9
    (0, 1)    9      8.1    8.1    10
    (1, 0)    8.1    7.29   7.29   8.1
    (1, 1)    9      8.1    7.29   -10
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rljax.envs.env import Env, Step
from rljax.envs.tabular import TabularMDP, tabulate

MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))  # up, down, left, right


class Maze(NamedTuple):
    """Parameters: the map, cell by cell [rows columns], slip and time limit."""

    walls: jax.Array  # bool
    starts: jax.Array  # bool: an episode starts in one of them
    ends: jax.Array  # bool: an episode ends there
    rewards: jax.Array  # of a step that ends in the cell
    slip: jax.Array  # probability that an action drawn uniformly takes the place of the one chosen
    max_steps: jax.Array  # an episode is truncated after


class State(NamedTuple):
    position: jax.Array  # row, column
    time: jax.Array  # steps so far


def cell_index(position: jax.Array, maze: Maze) -> jax.Array:
    """The position as one integer, row by row."""
    return position[0] * maze.walls.shape[1] + position[1]


def one_hot(position: jax.Array, maze: Maze) -> jax.Array:
    """[rows · columns]"""
    return jax.nn.one_hot(cell_index(position, maze), maze.walls.size)


def row_and_column(position: jax.Array, maze: Maze) -> jax.Array:
    """[2], each from 0 to 1."""
    return position / jnp.maximum(jnp.asarray(maze.walls.shape) - 1, 1)


def make_maze(
    rows: int = 2,
    columns: int = 3,
    start: tuple[int, int] | None = (0, 0),
    goal: tuple[int, int] | None = (0, 2),
    trap: tuple[int, int] | None = (1, 2),
    walls: tuple[tuple[int, int], ...] = (),
    max_steps: int = 50,
    slip: float = 0.0,
    reward: float = 10.0,
    observe: Callable = one_hot,
) -> Env:
    """A maze as an Env. Positions are (row, column); start None: any cell that is no wall and no end.

    Args: reward: of the goal; the trap's is its negative. observe: (position, maze) -> observation: `one_hot`,
    `row_and_column`, `cell_index`, or the caller's own.

    Raises ValueError for a position off the grid or in a wall, two ends in one cell, no cell to start in, or a slip
    that is no probability.
    """
    check_slip(slip)
    blank = jnp.zeros((rows, columns), bool)
    special = {"start": start, "goal": goal, "trap": trap}
    cells = special | {f"wall {n}": wall for n, wall in enumerate(walls)}
    for name, place in cells.items():
        check_on_grid(name, place, rows, columns)
        if name in special and place in walls:
            raise ValueError(f"{name} at {place} is in a wall")
    for name, place, others in (("trap", trap, (goal,)), ("start", start, (goal, trap))):
        if place is not None and place in others:
            raise ValueError(f"{name} at {place} is where an episode ends already; legal: another cell")

    def mark(*places):
        marked = blank
        for place in places:
            marked = marked if place is None else marked.at[place].set(True)
        return marked

    blocked = mark(*walls)
    ends = mark(goal, trap)
    starts = ~(blocked | ends) if start is None else mark(start)
    if not starts.any():
        raise ValueError("no cell is left to begin in: all are walls or ends")
    rewards = reward * mark(goal) - reward * mark(trap)
    return maze_env(Maze(blocked, starts, ends, rewards, jnp.float32(slip), jnp.int32(max_steps)), observe)


def check_on_grid(name: str, place: tuple[int, int] | None, rows: int, columns: int) -> None:
    """Raise ValueError, naming the position, where it is no cell of the grid."""
    if place is not None and not (0 <= place[0] < rows and 0 <= place[1] < columns):
        raise ValueError(f"{name} at {place} is off the grid of {rows} x {columns}")


def check_slip(slip: float) -> None:
    """Raise ValueError for what is no probability."""
    if not 0 <= slip <= 1:
        raise ValueError(f"slip = {slip}; legal: a probability, 0 to 1")


def maze_env(maze: Maze, observe: Callable = one_hot) -> Env:
    """The Env of a map."""

    def reset(key, maze: Maze):
        cell = jax.random.categorical(key, jnp.where(maze.starts.ravel(), 0.0, -jnp.inf))
        position = jnp.stack(jnp.divmod(cell, maze.walls.shape[1])).astype(jnp.int32)
        return observe(position, maze), State(position, jnp.int32(0))

    def step(key, state: State, action, maze: Maze) -> Step:
        slip_key, action_key = jax.random.split(key)
        slipped = jax.random.uniform(slip_key) < maze.slip
        random_action = jax.random.randint(action_key, (), 0, len(MOVES))
        action = jnp.where(slipped, random_action, action)
        position = move(state.position, action, maze)
        row, column = position
        new = State(position, state.time + 1)
        terminated = maze.ends[row, column]
        truncated = ~terminated & (new.time >= maze.max_steps)
        return Step(observe(position, maze), new, maze.rewards[row, column], terminated, truncated, {})

    return Env(reset, step, len(MOVES), maze)


def move(position: jax.Array, action: jax.Array, maze: Maze) -> jax.Array:
    """The position after an action: the same one at the edge of the grid or in front of a wall."""
    target = position + jnp.asarray(MOVES, jnp.int32)[action]
    inside = jnp.clip(target, 0, jnp.asarray(maze.walls.shape, jnp.int32) - 1)
    free = (inside == target).all() & ~maze.walls[inside[0], inside[1]]
    return jnp.where(free, inside, position)


def maze_mdp(maze: Maze, gamma: float) -> TabularMDP:
    """The maze as tables, its cells indexed row by row. The time limit is no part of it.

    Ends are terminal, and so are walls, which nothing enters: the values of both are 0.
    """
    rows, columns = maze.walls.shape
    cells = jnp.stack(jnp.divmod(jnp.arange(rows * columns), columns), axis=1).astype(jnp.int32)

    def outcome(cell, action):
        position = move(cell, action, maze)
        return cell_index(position, maze), maze.rewards[position[0], position[1]]

    return tabulate(outcome, cells, len(MOVES), (maze.ends | maze.walls).ravel(), gamma, maze.slip)
