"""Four rooms (Sutton, Precup & Singh 1999): a maze with one goal, reward 1; a third of the actions slip."""

from collections.abc import Callable

import jax.numpy as jnp

from rljax.envs.env import Env
from rljax.envs.maze import Maze, check_on_grid, check_slip, maze_env, one_hot

MAP = """
xxxxxxxxxxxxx
x     x     x
x     x     x
x           x
x     x     x
x     x     x
xx xxxx     x
x     xxx xxx
x     x     x
x     x     x
x           x
x     x     x
xxxxxxxxxxxxx
"""


def make_four_rooms(
    start: tuple[int, int] | None = (4, 1),
    goal: tuple[int, int] = (8, 9),
    slip: float = 4 / 9,
    max_steps: int = 500,
    observe: Callable = one_hot,
) -> Env:
    """The map of gymnax. slip 4/9: a third of the actions become another one (a uniform draw may be the chosen one).

    start None: any free cell but the goal. Raises ValueError for a position off the map or in a wall, a start at the
    goal, or a slip that is no probability.
    """
    check_slip(slip)
    lines = MAP.strip().splitlines()
    for name, position in (("goal", goal), ("start", start)):
        check_on_grid(name, position, len(lines), len(lines[0]))
        if position is not None and lines[position[0]][position[1]] == "x":
            raise ValueError(f"{name} at {position} is in a wall")
    if start == goal:
        raise ValueError(f"start and goal are both at {goal}; legal: two cells")
    walls = jnp.array([[cell == "x" for cell in line] for line in lines])
    at_goal = jnp.zeros(walls.shape, bool).at[goal].set(True)
    starts = ~walls & ~at_goal if start is None else jnp.zeros(walls.shape, bool).at[start].set(True)
    return maze_env(Maze(walls, starts, at_goal, 1.0 * at_goal, jnp.float32(slip), jnp.int32(max_steps)), observe)
