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
    """The map, cell by cell [rows columns], and two numbers."""

    walls: jax.Array  # bool
    starts: jax.Array  # bool: an episode begins in one of them
    ends: jax.Array  # bool: an episode ends there
    rewards: jax.Array  # of a step that leads there, or stays there
    slip: jax.Array  # probability that an action drawn uniformly takes the place of the one chosen
    limit: jax.Array  # steps after which an episode is truncated


class State(NamedTuple):
    position: jax.Array  # row, column
    time: jax.Array


def number(position, maze: Maze):
    """The position as one number, row by row."""
    return position[0] * maze.walls.shape[1] + position[1]


def one_hot(position, maze: Maze):
    """[rows · columns]"""
    return jax.nn.one_hot(number(position, maze), maze.walls.size)


def row_and_column(position, maze: Maze):
    """[2], each from 0 to 1."""
    return position / jnp.maximum(jnp.asarray(maze.walls.shape) - 1, 1)


def make_maze(
    rows: int = 2,
    columns: int = 3,
    start: tuple[int, int] | None = (0, 0),
    goal: tuple[int, int] | None = (0, 2),
    trap: tuple[int, int] | None = (1, 2),
    walls: tuple[tuple[int, int], ...] = (),
    limit: int = 50,
    slip: float = 0.0,
    reward: float = 10.0,
    observe: Callable = one_hot,
) -> Env:
    """A maze as an Env. Positions are (row, column); start None: any cell where one can stand.

    Args: reward: of the goal; the trap's is its negative. observe: (position, maze) -> observation: `one_hot`,
    `row_and_column`, `number`, or the caller's own.

    Raises ValueError for a position off the grid or in a wall, two ends in one place, or nowhere to begin.
    """
    blank = jnp.zeros((rows, columns), bool)
    named = {"start": start, "goal": goal, "trap": trap, **{f"wall {n}": wall for n, wall in enumerate(walls)}}
    for name, place in named.items():
        if place is not None and not (0 <= place[0] < rows and 0 <= place[1] < columns):
            raise ValueError(f"{name} at {place} is off the grid of {rows} x {columns}")
        if name in ("start", "goal", "trap") and place in walls:
            raise ValueError(f"{name} at {place} is in a wall")
    for name, place, others in (("trap", trap, (goal,)), ("start", start, (goal, trap))):
        if place is not None and place in others:
            raise ValueError(f"{name} at {place} is where an episode ends already; legal: another cell")

    def mark(*places):
        marked = blank
        for place in places:
            marked = marked if place is None else marked.at[place].set(True)
        return marked

    blocked, ends = mark(*walls), mark(goal, trap)
    starts = ~(blocked | ends) if start is None else mark(start)
    if not starts.any():
        raise ValueError("no cell is left to begin in: all are walls or ends")
    rewards = reward * mark(goal) - reward * mark(trap)
    return env_of(Maze(blocked, starts, ends, rewards, jnp.float32(slip), jnp.int32(limit)), observe)


def env_of(maze: Maze, observe: Callable = one_hot) -> Env:
    """The Env of a map."""

    def reset(key, maze: Maze):
        place = jax.random.categorical(key, jnp.where(maze.starts.ravel(), 0.0, -jnp.inf))
        position = jnp.stack(jnp.divmod(place, maze.walls.shape[1])).astype(jnp.int32)
        return observe(position, maze), State(position, jnp.int32(0))

    def step(key, state: State, action, maze: Maze) -> Step:
        whether, which = jax.random.split(key)
        slipped = jax.random.uniform(whether) < maze.slip
        action = jnp.where(slipped, jax.random.randint(which, (), 0, len(MOVES)), action)
        position = move(state.position, action, maze)
        row, column = position
        new = State(position, state.time + 1)
        ended = maze.ends[row, column]
        truncated = ~ended & (new.time >= maze.limit)
        return Step(observe(position, maze), new, maze.rewards[row, column], ended, truncated, {})

    return Env(reset, step, len(MOVES), maze)


def move(position, action, maze: Maze):
    """Where an action leads: nowhere, where the grid ends or a wall stands."""
    target = position + jnp.asarray(MOVES, jnp.int32)[action]
    inside = jnp.clip(target, 0, jnp.asarray(maze.walls.shape, jnp.int32) - 1)
    free = (inside == target).all() & ~maze.walls[inside[0], inside[1]]
    return jnp.where(free, inside, position)


def maze_mdp(maze: Maze, gamma: float) -> TabularMDP:
    """The maze as tables, its cells numbered row by row, its ends terminal. The time limit is no part of it."""
    rows, columns = maze.walls.shape
    cells = jnp.stack(jnp.divmod(jnp.arange(rows * columns), columns), axis=1).astype(jnp.int32)

    def outcome(cell, action):
        position = move(cell, action, maze)
        return number(position, maze), maze.rewards[position[0], position[1]]

    return tabulate(outcome, cells, len(MOVES), maze.ends.ravel(), gamma, maze.slip)
