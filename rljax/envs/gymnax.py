"""Environments of gymnax (https://github.com/RobertTLange/gymnax) under our protocol: the `envs` extra."""

from typing import Any

import jax.numpy as jnp

from rljax.envs.env import Box, Env, Step


def make_gymnax(name: str, **arguments) -> Env:
    """`gymnax.make(name, **arguments)` as an Env, observed as one vector of floats.

    Its own auto-reset is left out: `rollouts.unroll` resets. A step that ends an episode both ways has terminated it.
    A continuous action is clipped to its bounds, which only some of gymnax's environments do by themselves.

    Raises ImportError without gymnax, ValueError for a name it does not know.
    """
    try:
        import gymnax
    except ImportError:
        raise ImportError("gymnax is not installed: pip install 'rljax[envs]' (Python 3.11)") from None
    if name not in gymnax.registered_envs:
        raise ValueError(f"gymnax has no {name!r}; it has {', '.join(gymnax.registered_envs)}")
    env, params = gymnax.make(name, **arguments)
    actions = convert_action_space(env.action_space(params))

    def observe(observation):
        return jnp.ravel(observation).astype(jnp.float32)

    def reset(key, params):
        observation, state = env.reset_env(key, params)
        return observe(observation), state

    def step(key, state, action, params) -> Step:
        if isinstance(actions, Box):
            action = jnp.clip(action, jnp.asarray(actions.low), jnp.asarray(actions.high))
        observation, state, reward, terminated, info = env.step_env(key, state, action, params)
        terminated = jnp.asarray(terminated, bool)
        truncated = ~terminated & env.is_truncated(state, params)
        return Step(observe(observation), state, jnp.float32(reward), terminated, truncated, info)

    return Env(reset, step, actions, params)


def convert_action_space(space: Any) -> int | Box:
    """Of a gymnax space, the number of actions or their bounds.

    Raises ValueError for a space that is neither Discrete nor a Box of one axis.
    """
    if hasattr(space, "n"):
        return int(space.n)
    if len(getattr(space, "shape", ())) == 1:
        return Box(low=_bounds(space.low, space.shape), high=_bounds(space.high, space.shape))
    raise ValueError(f"actions may be Discrete or a Box of one axis, not {space}")


def _bounds(value, shape: tuple[int, ...]) -> tuple[float, ...]:
    return tuple(jnp.broadcast_to(jnp.asarray(value, jnp.float32), shape).tolist())
