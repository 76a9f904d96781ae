"""CartPole-v1: push a cart to the left or the right so that the pole on it stays up (Barto, Sutton & Anderson 1983).

Equations and numbers are those of gym's `cartpole.py`, Euler steps of 0.02 s. Every step pays 1, the failing one too;
the episode fails where the pole leans by more than 12 degrees or the cart leaves ±2.4, and is truncated after 500
steps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rljax.envs.env import Env, Step


class CartPole(NamedTuple):
    gravity: float = 9.8
    cart: float = 1.0  # mass
    pole: float = 0.1  # mass
    half_length: float = 0.5  # of the pole
    force: float = 10.0
    seconds: float = 0.02  # of a step
    lean: float = 12 * 2 * jnp.pi / 360  # radians
    edge: float = 2.4
    limit: int = 500


class State(NamedTuple):
    physics: jax.Array  # place and speed of the cart, angle and angular speed of the pole: what is observed
    time: jax.Array


def make_cartpole(**numbers) -> Env:
    """CartPole as an Env; `numbers`: fields of `CartPole`."""
    return Env(reset, step, 2, CartPole(**numbers))


def reset(key, params: CartPole):
    physics = jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)
    return physics, State(physics, jnp.int32(0))


def step(key, state: State, action, params: CartPole) -> Step:
    _, speed, angle, spin = state.physics
    mass = params.cart + params.pole
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    push = (params.force * (2 * action - 1) + params.pole * params.half_length * spin**2 * sin) / mass
    turn = (params.gravity * sin - cos * push) / (params.half_length * (4 / 3 - params.pole * cos**2 / mass))
    rates = jnp.stack([speed, push - params.pole * params.half_length * turn * cos / mass, spin, turn])
    physics = state.physics + params.seconds * rates
    new = State(physics, state.time + 1)
    failed = (jnp.abs(physics[0]) > params.edge) | (jnp.abs(physics[2]) > params.lean)
    return Step(physics, new, jnp.float32(1.0), failed, ~failed & (new.time >= params.limit), {})
