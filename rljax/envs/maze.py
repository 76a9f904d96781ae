"""The 2x3 maze: from the upper left corner to the goal in the upper right one, past a trap below it.

    . . G
    . . T

Four actions (up, down, left, right); a step off the grid or into a wall stays; goal +10, trap -10, both end the
episode; every other step 0. With γ = 0.9 the optimal values are 9, 10 in the upper row and 8.1, 9 in the lower.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rljax.envs.env import Env, Step

MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))  # up, down, left, right


class Maze(NamedTuple):
    """Positions are (row, column); walls [rows, columns] bool."""

    walls: jax.Array
    start: jax.Array
    goal: jax.Array
    trap: jax.Array
    limit: jax.Array  # steps after which an episode is truncated


class State(NamedTuple):
    position: jax.Array
    time: jax.Array


def make_maze(rows=2, columns=3, start=(0, 0), goal=(0, 2), trap=(1, 2), walls=(), limit: int = 50) -> Env:
    """The maze as an Env that observes its position as a one-hot vector of length rows · columns."""
    blocked = jnp.zeros((rows, columns), bool)
    for wall in walls:
        blocked = blocked.at[wall].set(True)
    maze = Maze(blocked, *(jnp.asarray(place, jnp.int32) for place in (start, goal, trap)), jnp.int32(limit))
    return Env(reset, step, len(MOVES), maze)


def observe(position, maze: Maze):
    """One-hot of the position, row by row."""
    columns = maze.walls.shape[1]
    return jax.nn.one_hot(position[0] * columns + position[1], maze.walls.size)


def reset(key, maze: Maze):
    return observe(maze.start, maze), State(maze.start, jnp.int32(0))


def step(key, state: State, action, maze: Maze) -> Step:
    target = state.position + jnp.asarray(MOVES, jnp.int32)[action]
    edge = jnp.asarray(maze.walls.shape, jnp.int32) - 1
    inside = jnp.clip(target, 0, edge)
    position = jnp.where((inside == target).all() & ~maze.walls[inside[0], inside[1]], inside, state.position)
    at_goal, at_trap = (position == maze.goal).all(), (position == maze.trap).all()
    new = State(position, state.time + 1)
    ended = at_goal | at_trap
    truncated = ~ended & (new.time >= maze.limit)
    return Step(observe(position, maze), new, 10.0 * at_goal - 10.0 * at_trap, ended, truncated, {})
