"""Pendulum-v1: swing a pendulum up and hold it there, by a torque within ±2. It never terminates; 200 steps an episode.

    r = -(θ² + 0.1 θ'² + 0.001 u²)        θ = 0 is up, in (-π, π]

Equations and numbers are those of gym's `pendulum.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rljax.envs.env import Box, Env, Step

TORQUE, SPEED = 2.0, 8.0  # bounds


class Pendulum(NamedTuple):
    gravity: float = 10.0
    mass: float = 1.0
    length: float = 1.0
    seconds: float = 0.05  # of a step
    limit: int = 200


class State(NamedTuple):
    angle: jax.Array
    speed: jax.Array
    time: jax.Array


def make_pendulum(**numbers) -> Env:
    """The pendulum as an Env that observes cos θ, sin θ, θ'; `numbers`: fields of `Pendulum`."""
    return Env(reset, step, Box((-TORQUE,), (TORQUE,)), Pendulum(**numbers))


def observe(state: State):
    return jnp.stack([jnp.cos(state.angle), jnp.sin(state.angle), state.speed])


def reset(key, params: Pendulum):
    angle, speed = jax.random.uniform(key, (2,), minval=-1.0) * jnp.array([jnp.pi, 1.0])
    state = State(angle, speed, jnp.int32(0))
    return observe(state), state


def step(key, state: State, action, params: Pendulum) -> Step:
    torque = jnp.clip(action[0], -TORQUE, TORQUE)
    angle = (state.angle + jnp.pi) % (2 * jnp.pi) - jnp.pi
    reward = -(angle**2 + 0.1 * state.speed**2 + 0.001 * torque**2)
    rate = 1.5 * params.gravity / params.length * jnp.sin(state.angle) + 3.0 * torque / (params.mass * params.length**2)
    speed = jnp.clip(state.speed + rate * params.seconds, -SPEED, SPEED)
    new = State(state.angle + speed * params.seconds, speed, state.time + 1)
    return Step(observe(new), new, reward, jnp.bool_(False), new.time >= params.limit, {})
