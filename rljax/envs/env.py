"""The protocol of environments: pure functions that jit, vmap and scan."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Step(NamedTuple):
    """What one action brought. `observation` is that of `state`: where the episode ended, the last one of it."""

    observation: Any
    state: Any
    reward: Any
    terminated: Any  # bool: nothing follows
    truncated: Any  # bool: something would follow, but time is up; never together with `terminated`
    info: dict


class Box(NamedTuple):
    """Continuous actions: D numbers, each within its bounds."""

    low: tuple[float, ...]
    high: tuple[float, ...]


class Env(NamedTuple):
    """An environment; its numbers (sizes, rewards, positions) are in `params`, so that they can be traced."""

    reset: Callable  # (key, params) -> (observation, state)
    step: Callable  # (key, state, action, params) -> Step
    actions: int | Box  # how many there are to choose from; or their bounds
    params: Any


def auto_reset(env: Env) -> Env:
    """The environment that begins anew where an episode ended: observation and state are then the next episode's first.

    `info["final_observation"]` is what the action led to, before any reset: the one to bootstrap from.
    """

    def step(key, state, action, params) -> Step:
        step_key, reset_key = jax.random.split(key)
        out = env.step(step_key, state, action, params)
        ended = out.terminated | out.truncated
        observation, state = jax.tree.map(
            lambda first, last: jnp.where(ended, first, last),
            env.reset(reset_key, params),
            (out.observation, out.state),
        )
        info = {**out.info, "final_observation": out.observation}
        return out._replace(observation=observation, state=state, info=info)

    return env._replace(step=step)
