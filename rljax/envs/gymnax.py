"""Environments of gymnax (https://github.com/RobertTLange/gymnax) under our protocol: the `envs` extra."""

import jax.numpy as jnp

from rljax.envs.env import Box, Env, Step


def make_gymnax(name: str, **arguments) -> Env:
    """`gymnax.make(name, **arguments)` as an Env, observed as one vector of floats.

    Its own auto-reset is left out: `rollouts.unroll` begins anew, and `auto_reset` for who steps by hand. A step that
    ends an episode both ways has terminated it.

    Raises ImportError without gymnax, ValueError for a name it does not know.
    """
    try:
        import gymnax
    except ImportError:
        raise ImportError("gymnax is not installed: pip install 'rljax[envs]' (Python 3.11)") from None
    try:
        made, params = gymnax.make(name, **arguments)
    except ValueError:
        raise ValueError(f"gymnax has no {name!r}; it has {', '.join(gymnax.registered_envs)}") from None

    def observe(observation):
        return jnp.ravel(observation).astype(jnp.float32)

    def reset(key, params):
        observation, state = made.reset_env(key, params)
        return observe(observation), state

    def step(key, state, action, params) -> Step:
        observation, state, reward, terminated, info = made.step_env(key, state, action, params)
        terminated = jnp.asarray(terminated, bool)
        truncated = ~terminated & made.is_truncated(state, params)
        return Step(observe(observation), state, jnp.float32(reward), terminated, truncated, info)

    return Env(reset, step, actions_of(made.action_space(params)), params)


def actions_of(space) -> int | Box:
    """Of a gymnax space: how many, or bounds.

    Raises ValueError for a space that is neither Discrete nor a Box of one axis.
    """
    if hasattr(space, "n"):
        return int(space.n)
    if len(getattr(space, "shape", ())) == 1:
        bounds = (jnp.broadcast_to(jnp.asarray(x, jnp.float32), space.shape) for x in (space.low, space.high))
        return Box(*(tuple(bound.tolist()) for bound in bounds))
    raise ValueError(f"actions may be Discrete or a Box of one axis, not {space}")
