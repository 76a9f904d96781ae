"""Pendulum-v1: swing a pendulum up and hold it there, by a torque within ±2. It never terminates; 200 steps an episode.

    r = -(θ² + 0.1 θ'² + 0.001 u²)        θ = 0 is up, in (-π, π]

Equations and constants are those of gym's `pendulum.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rljax.envs.env import Box, Env, Step

MAX_TORQUE = 2.0
MAX_SPEED = 8.0


class Pendulum(NamedTuple):
    """Parameters."""

    gravity: float = 10.0
    mass: float = 1.0
    length: float = 1.0
    dt: float = 0.05  # seconds a step
    max_steps: int = 200  # an episode is truncated after


class State(NamedTuple):
    angle: jax.Array
    speed: jax.Array
    time: jax.Array  # steps so far


def make_pendulum(**params) -> Env:
    """The pendulum as an Env that observes cos θ, sin θ, θ'. params: fields of `Pendulum`."""
    return Env(reset, step, Box((-MAX_TORQUE,), (MAX_TORQUE,)), Pendulum(**params))


def _observe(state: State):
    return jnp.stack([jnp.cos(state.angle), jnp.sin(state.angle), state.speed])


def reset(key: jax.Array, params: Pendulum) -> tuple[jax.Array, State]:
    angle, speed = jax.random.uniform(key, (2,), minval=-1.0) * jnp.array([jnp.pi, 1.0])
    state = State(angle, speed, jnp.int32(0))
    return _observe(state), state


def step(key: jax.Array, state: State, action: jax.Array, params: Pendulum) -> Step:
    torque = jnp.clip(action[0], -MAX_TORQUE, MAX_TORQUE)
    angle = (state.angle + jnp.pi) % (2 * jnp.pi) - jnp.pi
    reward = -(angle**2 + 0.1 * state.speed**2 + 0.001 * torque**2)
    gravity_term = 1.5 * params.gravity / params.length * jnp.sin(state.angle)
    torque_term = 3.0 * torque / (params.mass * params.length**2)
    acceleration = gravity_term + torque_term
    speed = jnp.clip(state.speed + acceleration * params.dt, -MAX_SPEED, MAX_SPEED)
    new = State(state.angle + speed * params.dt, speed, state.time + 1)
    return Step(_observe(new), new, reward, jnp.bool_(False), new.time >= params.max_steps, {})
