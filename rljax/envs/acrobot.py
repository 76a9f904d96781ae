"""Acrobot-v1: swing the tip of a two-link pendulum above a line by a torque at its elbow (Sutton 1996).

Equations and numbers are gym's (its "book" version): links of length and mass 1, one Runge-Kutta step of 0.2 s. Every
step pays -1 but the one that gets there, which terminates; truncated after 500 steps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rljax.envs.env import Env, Step

SECONDS, GRAVITY = 0.2, 9.8
FASTEST = (4 * jnp.pi, 9 * jnp.pi)  # of the two joints, radians a second


class Acrobot(NamedTuple):
    limit: int = 500


class State(NamedTuple):
    physics: jax.Array  # two angles, two speeds
    time: jax.Array


def make_acrobot(**numbers) -> Env:
    """Acrobot as an Env that observes cosine and sine of both angles, and both speeds. Actions: torque -1, 0, 1."""
    return Env(reset, step, 3, Acrobot(**numbers))


def observe(physics):
    a, b, *speeds = physics
    return jnp.stack([jnp.cos(a), jnp.sin(a), jnp.cos(b), jnp.sin(b), *speeds])


def reset(key, params: Acrobot):
    physics = jax.random.uniform(key, (4,), minval=-0.1, maxval=0.1)
    return observe(physics), State(physics, jnp.int32(0))


def rates(physics, torque):
    """Time derivatives of angles and speeds: mass 1, centre of mass at 0.5, moment of inertia 1 of each link."""
    a, b, va, vb = physics
    d1 = 0.25 + (1.25 + jnp.cos(b)) + 2.0
    d2 = 0.25 + 0.5 * jnp.cos(b) + 1.0
    phi2 = 0.5 * GRAVITY * jnp.cos(a + b - jnp.pi / 2)
    phi1 = -0.5 * vb * jnp.sin(b) * (vb + 2.0 * va) + 1.5 * GRAVITY * jnp.cos(a - jnp.pi / 2) + phi2
    second = (torque + d2 / d1 * phi1 - 0.5 * va**2 * jnp.sin(b) - phi2) / (1.25 - d2**2 / d1)
    return jnp.stack([va, vb, -(d2 * second + phi1) / d1, second])


def step(key, state: State, action, params: Acrobot) -> Step:
    def stage(carry, fraction):  # of Runge-Kutta: a scan compiles one, not four
        slope = rates(state.physics + fraction * SECONDS * carry, action - 1.0)
        return slope, slope

    fractions = jnp.array([0.0, 0.5, 0.5, 1.0])
    _, slopes = jax.lax.scan(stage, jnp.zeros(4), fractions)
    a, b, va, vb = state.physics + SECONDS / 6.0 * (jnp.array([1.0, 2.0, 2.0, 1.0]) @ slopes)
    a, b = ((angle + jnp.pi) % (2 * jnp.pi) - jnp.pi for angle in (a, b))
    va, vb = (jnp.clip(v, -top, top) for v, top in zip((va, vb), FASTEST, strict=True))
    physics = jnp.stack([a, b, va, vb])
    new = State(physics, state.time + 1)
    there = -jnp.cos(a) - jnp.cos(a + b) > 1.0
    return Step(observe(physics), new, jnp.where(there, 0.0, -1.0), there, ~there & (new.time >= params.limit), {})
