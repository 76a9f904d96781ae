"""Episodes of a pure environment: one a row, all rows at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rljax.rollouts.unroll import begin, chance, unroll
from rljax.types import Params, Trajectory


def episodes(env, act: Callable, params: Params, key, rows: int, length: int, draws: int = 1) -> Trajectory:
    """One episode a row, of at most `length` decisions; columns after its end are masked.

    Args: as of `unroll`. An episode still running at the end is truncated there.
    """
    starting, playing = jax.random.split(key)
    first = begin(env, starting, rows)
    once = jax.tree.map(lambda x: x[0], first)
    masked = env._replace(reset=lambda key, params: once)  # what follows an end is masked: no resets to pay for
    _, traj = unroll(masked, act, params, chance(masked, playing, rows, length, draws), first)
    ended = (traj.terminated | traj.truncated).astype(jnp.int32)
    mask = jnp.cumsum(ended, axis=1) - ended == 0
    running = mask[:, -1] & (ended[:, -1] == 0)
    return traj.replace(
        mask=mask,
        rewards=jnp.where(mask, traj.rewards, 0.0),
        terminated=traj.terminated & mask,
        truncated=(traj.truncated & mask).at[:, -1].max(running),
        group=jnp.zeros(rows, jnp.int32),
    )
