"""CartPole-v1: push a cart to the left or the right so that the pole on it stays up (Barto, Sutton & Anderson 1983).

Equations and constants are those of gym's `cartpole.py`, Euler steps of 0.02 s. The reward is 1 a step, the last one
too. The episode terminates where the pole leans by more than 12 degrees or the cart leaves ±2.4, and is truncated after
500 steps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rljax.envs.env import Env, Step


class CartPole(NamedTuple):
    """Parameters, under gym's names."""

    gravity: float = 9.8
    masscart: float = 1.0
    masspole: float = 0.1
    length: float = 0.5  # half of the pole's
    force_mag: float = 10.0
    tau: float = 0.02  # seconds a step
    theta_threshold_radians: float = 12 * 2 * jnp.pi / 360
    x_threshold: float = 2.4
    max_steps: int = 500  # an episode is truncated after


class State(NamedTuple):
    physics: jax.Array  # position and velocity of the cart, angle and angular velocity of the pole: what is observed
    time: jax.Array  # steps so far


def make_cartpole(**params) -> Env:
    """CartPole as an Env. params: fields of `CartPole`. Actions: push to the left, to the right."""
    return Env(reset, step, 2, CartPole(**params))


def reset(key: jax.Array, params: CartPole) -> tuple[jax.Array, State]:
    physics = jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)
    return physics, State(physics, jnp.int32(0))


def step(key: jax.Array, state: State, action: jax.Array, params: CartPole) -> Step:
    _, velocity, angle, spin = state.physics
    mass = params.masscart + params.masspole
    sin = jnp.sin(angle)
    cos = jnp.cos(angle)
    force = params.force_mag * (2 * action - 1)
    push = (force + params.masspole * params.length * spin**2 * sin) / mass
    angular_acceleration = (params.gravity * sin - cos * push) / (
        params.length * (4 / 3 - params.masspole * cos**2 / mass)
    )
    acceleration = push - params.masspole * params.length * angular_acceleration * cos / mass
    derivatives = jnp.stack([velocity, acceleration, spin, angular_acceleration])
    physics = state.physics + params.tau * derivatives
    new = State(physics, state.time + 1)
    off_track = jnp.abs(physics[0]) > params.x_threshold
    fallen = jnp.abs(physics[2]) > params.theta_threshold_radians
    terminated = off_track | fallen
    truncated = ~terminated & (new.time >= params.max_steps)
    return Step(physics, new, jnp.float32(1.0), terminated, truncated, {})
