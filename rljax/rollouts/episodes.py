"""Episodes of a pure environment: one a row, all rows at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rljax.rollouts.unroll import draw_noise, reset_envs, unroll
from rljax.types import Array, Params, Trajectory


def episodes(env: Any, act: Callable, params: Params, key: Array, rows: int, length: int, draws: int = 1) -> Trajectory:
    """One episode a row, of at most `length` decisions; columns after its end are masked.

    Args: as of `unroll`. An episode still running at the end is truncated there.
    """
    reset_key, noise_key = jax.random.split(key)
    carry = reset_envs(env, reset_key, rows)
    one_reset = jax.tree.map(lambda x: x[0], carry)
    # What follows an end is masked, so any state will do there: no resets are paid for.
    masked_env = env._replace(reset=lambda key, params: one_reset)
    noise = draw_noise(masked_env, noise_key, rows, length, draws)
    _, traj = unroll(masked_env, act, params, noise, carry)
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
